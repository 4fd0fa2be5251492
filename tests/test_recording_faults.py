"""Recording while the disk is full, or the folder is removed or replaced: requests go on, and nothing is lost silently.

The disk is really full here: the process may not make a file larger than a few bytes (RLIMIT_FSIZE), so that writing
fails in the middle of a line, as it does when a disk fills up.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_segments_of_loads import MODULES, announce, step
from test_trace_format import process

from lora_probe import open_trace
from lora_probe.ledger import OK, headline
from lora_probe.recording import Rows, TraceWriter, outage

pytestmark = pytest.mark.timeout(60)
WORKER = "vllm-rank-0"
ROWS = 20
"""Rows of each load in a step: a segment of them is larger than what events.jsonl begins with."""


@pytest.fixture(autouse=True)
def retried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "RETRY_SECONDS", 0.0)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def reported() -> list[str]:
    return []


@pytest.fixture
def writer(tmp_path: Path, reported: list[str]) -> TraceWriter:
    writer = TraceWriter(tmp_path / "run" / WORKER, process(role="worker"), 10_000_000, reported.append)
    for load, modules in MODULES.items():
        announce(writer, load, modules)
    return writer


def rows_at(writer: TraceWriter, start: int) -> None:
    writer.rows(step([0, 1, -1] * ROWS, start=start))
    writer.flush()


def positions(folder: Path) -> set[int]:
    rows = open_trace(folder).rows
    return set() if rows is None else set(rows.position.tolist())


def test_a_full_disk_is_reported_once_and_recorded_when_there_is_room(
    writer: TraceWriter, tmp_path: Path, reported: list[str]
) -> None:
    rows_at(writer, 0)
    events = tmp_path / "run" / WORKER / "events.jsonl"
    with full_disk(events.stat().st_size + 20):
        for start in (1, 2, 3):
            rows_at(writer, start)
        writer.station(0, "placed", OK, list(MODULES[0]))
        writer.event("evict", "adapter-0 removed from slot 1")
        # No line is cut in the middle, and the reader reads what there is.
        assert events.read_bytes().endswith(b"}\n")
        rows = open_trace(tmp_path / "run").rows_of(0)
        assert rows is not None
        assert set(rows.position.tolist()) == {0}
        assert len(reported) == 1
        assert "the recording cannot be written: " in reported[0]
    rows_at(writer, 4)
    assert len(reported) == 2
    assert "nothing was lost" in reported[1]
    writer.close()
    trace = open_trace(tmp_path / "run")
    assert positions(tmp_path / "run") == {0, 1, 2, 3, 4}
    assert trace.complete
    assert [event.stage for event in trace.events] == ["evict", "lost"]
    (_, ledger), _ = trace.loads
    assert {row.stations["placed"] for row in ledger.rows} == {OK}
    assert not list((tmp_path / "run" / WORKER).glob("*.partial"))


def test_rows_that_are_too_many_to_wait_are_counted(
    writer: TraceWriter, tmp_path: Path, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "MAX_WAITING_ROWS", 4 * step([0, 1, -1] * ROWS).nbytes)
    rows_at(writer, 0)
    with full_disk(10):
        for start in range(1, 41):
            rows_at(writer, start)
    rows_at(writer, 41)
    writer.close()
    trace = open_trace(tmp_path / "run")
    there = positions(tmp_path / "run")
    assert {0, 40, 41} <= there
    rows = trace.rows
    assert rows is not None
    assert trace.dropped.lost_rows == 42 * 3 * ROWS - len(rows) > 0
    assert f"{trace.dropped.lost_rows:,} rows were lost" in trace.events[-1].text
    assert not trace.complete
    assert reported[-1].endswith(f"{trace.dropped.lost_rows:,} rows were lost")


def test_a_ledger_that_was_cut_is_not_counted_as_whole(
    tmp_path: Path, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "MAX_WAITING_LINES", 0)
    with TraceWriter(tmp_path / "whole", process(role="worker")) as whole:
        announce(whole, 0, MODULES[0])
    load, module, *_ = (tmp_path / "whole" / "events.jsonl").read_bytes().splitlines(keepends=True)
    writer = TraceWriter(tmp_path / "run" / WORKER, process(role="worker"), None, reported.append)
    with full_disk(len(load + module) + 9):
        announce(writer, 0, MODULES[0])
    writer.station(0, "stored", OK, list(MODULES[0]))
    writer.close()
    ((record, ledger),) = open_trace(tmp_path / "run").loads
    assert (record.modules, len(ledger.rows), ledger.cut) == (2, 1, 1)
    assert headline(ledger).startswith("0 of 2 modules took effect, ")
    assert headline(ledger).endswith("1 unknown: the trace was cut, and their records are not in it")
    assert not ledger.healthy


def test_a_folder_that_was_removed_is_created_again(writer: TraceWriter, tmp_path: Path, reported: list[str]) -> None:
    rows_at(writer, 0)
    shutil.rmtree(tmp_path / "run")
    rows_at(writer, 1)
    writer.event("evict", "adapter-0 removed from slot 1")
    writer.close()
    trace = open_trace(tmp_path / "run")
    assert positions(tmp_path / "run") == {1}
    assert [event.stage for event in trace.events] == ["lost", "evict"]
    assert "the folder was removed" in trace.events[0].text
    assert len(reported) == 1
    rows = trace.rows
    assert rows is not None
    # G goes with the rows: its earlier segment is gone.
    assert rows.placed[0].gram is not None
    assert trace.processes[0].missing == 3


def test_a_removed_folder_is_noticed_without_any_row(writer: TraceWriter, tmp_path: Path) -> None:
    """At level `events` there are no rows."""
    shutil.rmtree(tmp_path / "run")
    writer.station(0, "placed", OK, list(MODULES[0]))
    lines = (tmp_path / "run" / WORKER / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["event", "station"]
    writer.close()


def test_a_folder_that_cannot_be_created_again(writer: TraceWriter, tmp_path: Path, reported: list[str]) -> None:
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file in the way")
    rows_at(writer, 1)
    writer.event("evict", "adapter-0 removed from slot 1")
    assert len(reported) == 1
    (tmp_path / "run").unlink()
    rows_at(writer, 2)
    assert positions(tmp_path / "run") == {1, 2}
    writer.close()


def test_closing_on_a_folder_that_is_gone_does_not_raise(
    writer: TraceWriter, tmp_path: Path, reported: list[str]
) -> None:
    writer.rows(step([0]))
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("a file in the way")
    writer.close()
    writer.close()
    assert reported[-1].startswith("the recording has ended: nothing could be written")
    assert "1 rows" in reported[-1]


def test_an_engine_of_its_own_still_fails_on_a_full_disk(tmp_path: Path) -> None:
    """`trace` reports the error of the disk: it is not a server that must go on."""
    writer = TraceWriter(tmp_path / "peft", process())
    with full_disk(10), pytest.raises(OSError, match="too large"):
        rows_at(writer, 0)


THREAD = """
import resource, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
import test_segments_of_loads as made
from test_trace_format import process
from lora_probe.recording import TraceWriter, outage
outage.RETRY_SECONDS = 0.05

@contextmanager
def guard(stage):
    try:
        yield
    except Exception as error:
        print("guarded", stage, repr(error), flush=True)

reported = []
writer = TraceWriter(Path(sys.argv[1]) / "vllm-rank-0", process(role="worker"), None, reported.append)
writer.flush_by_time(guard)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
writer.rows(made.step([0]))
while not reported:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
while len(reported) < 2:
    time.sleep(0.01)
writer.rows(made.step([0], start=1))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_thread_survives_a_full_disk_and_kill_takes_nothing(tmp_path: Path) -> None:
    """Half a second after its last row a process is killed: all rows are there, and it no longer runs."""
    command = [sys.executable, "-c", THREAD, str(tmp_path)]
    child = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=Path(__file__).parent)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.5)
    trace = open_trace(tmp_path)
    assert trace.running
    child.kill()
    _, errors = child.communicate()
    assert errors == ""
    trace = open_trace(tmp_path)
    assert not trace.running
    assert positions(tmp_path) == {0, 1}
    assert trace.unclosed == (WORKER,)


def test_an_exception_in_the_thread_is_guarded(tmp_path: Path) -> None:
    stages: list[str] = []

    @contextmanager
    def guard(stage: str) -> Iterator[None]:
        try:
            yield
        except ValueError:
            stages.append(stage)

    writer = TraceWriter(tmp_path / WORKER, process(role="worker"), None, lambda text: None)
    writer.flush_by_time(guard)
    wrong = step([0])
    # A table of requests that is too short for its rows, as a bug of ours could make it.
    writer.rows(Rows(**{**vars(wrong), "output_norm": np.ones((1, 1), np.float32)}))
    writer.rows(step([0], start=1))
    deadline = time.monotonic() + 10
    while not stages:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stages[0] == "writing the rows"
    writer.close()


def test_a_live_recording_is_not_called_ended(writer: TraceWriter, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert {headline(ledger) for _, ledger in open_trace(run).loads} == {
        "0 of 2 modules took effect, 2 unknown from stored on: no request has used the adapter yet (LP500)"
    }
    rows_at(writer, 0)
    trace = open_trace(run)
    assert trace.running
    assert "not measured yet: the recording is still running" in headline(trace.loads[0][1])
    assert trace.processes[0].process.segments == 3
    writer.close()
    ended = open_trace(run)
    assert not ended.running
    assert "the recording ended before it was measured" in headline(ended.loads[0][1])


def test_a_process_of_another_start_of_the_machine_does_not_run(writer: TraceWriter, tmp_path: Path) -> None:
    path = tmp_path / "run" / WORKER / "process.json"
    data = json.loads(path.read_text())
    for changed in ({"host": "another"}, {"began": "1"}, {"pid": 2**22 + 1}, {"closed": True}):
        path.write_text(json.dumps(data | changed))
        assert not open_trace(tmp_path / "run").running, changed
    path.write_text(json.dumps(data))
    assert open_trace(tmp_path / "run").running
    writer.close()
