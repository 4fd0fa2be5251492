"""`attach` and the worker's side of it, without an engine: requests and answers are files. No torch, no vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import call

from lora_probe import open_trace
from lora_probe.cli import attach
from lora_probe.recording import SCHEMA, Process, TraceWriter
from lora_probe.recording.control import CONTROL, request_level
from lora_probe_vllm import watcher
from lora_probe_vllm.control import RequestedLevel
from lora_probe_vllm.watcher import Watcher


def process(rank: int = 0, **changes: Any) -> Process:
    settings = {"schema": SCHEMA, "role": "worker", "engine": "vllm", "rank": rank, "pid": os.getpid(), "versions": {}}
    return Process(**settings | {"keep": "events"} | changes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run.lptrace"


@pytest.fixture
def writers(run: Path) -> Iterator[list[TraceWriter]]:
    """Two workers that record and do not read requests."""
    writers = [TraceWriter(run / f"vllm-rank-{rank}", process(rank)) for rank in (0, 1)]
    yield writers
    for writer in writers:
        writer.close()


@pytest.fixture
def levels(writers: list[TraceWriter]) -> Iterator[list[RequestedLevel]]:
    """The same workers, which read requests as in vLLM."""
    levels = [RequestedLevel(writer) for writer in writers]
    watchers = [Watcher(level.poll) for level in levels]
    yield levels
    for thread in watchers:
        thread.close()


@pytest.mark.slow
def test_every_worker_answers(run: Path, levels: list[RequestedLevel], capsys: Any) -> None:
    status, out, err = call("attach", run, "--keep", "shrink", capsys=capsys)
    assert (status, err) == (0, "")
    lines = [f"vllm-rank-{rank} records shrink from the next step on (until now: events)" for rank in (0, 1)]
    assert out.splitlines() == lines
    assert [(level.pending, level.taken(), level.pending) for level in levels] == [(True, "shrink", False)] * 2
    trace = open_trace(run)
    assert {worker.process.keep for worker in trace.workers} == {"shrink"}
    assert [event.text for event in trace.events] == ["shrink is recorded from the next step on"]


@pytest.mark.slow
def test_the_same_level_twice_is_two_requests(run: Path, levels: list[RequestedLevel], capsys: Any) -> None:
    for before in ("events", "norms"):
        status, out, _ = call("attach", run, "--keep", "norms", "--format", "json", capsys=capsys)
        assert status == 0
        workers = [{"name": f"vllm-rank-{rank}", "before": before, "not_recorded": None} for rank in (0, 1)]
        assert json.loads(out) == {"schema_version": 1, "trace": str(run), "keep": "norms", "workers": workers}


@pytest.mark.slow
def test_an_engine_whose_rows_cannot_be_recorded(
    run: Path, writers: list[TraceWriter], levels: list[RequestedLevel], capsys: Any
) -> None:
    writers[0].describe(not_recorded="the engine compiles its model")
    status, out, _ = call("attach", run, "--keep", "norms", capsys=capsys)
    assert status == 1
    assert out.splitlines()[-1] == "contributions not recorded: the engine compiles its model"
    assert call("attach", run, "--keep", "events", capsys=capsys)[0] == 0


def test_a_request_from_before_the_recording_is_not_for_it(run: Path) -> None:
    run.mkdir()
    request_level(run, "tensors")
    with TraceWriter(run / "vllm-rank-0", process()) as writer:
        level = RequestedLevel(writer)
        level.poll()
        assert not level.pending
        request_level(run, "norms")
        level.poll()
        assert level.taken() == "norms"


@pytest.mark.parametrize("content", ["", "{", '{"schema": 1, "request": "a", "keep": "all"}', "[]"])
def test_a_damaged_request_is_reported_once_and_the_next_one_works(run: Path, content: str) -> None:
    with TraceWriter(run / "vllm-rank-0", process()) as writer:
        level = RequestedLevel(writer)
        (run / CONTROL).write_text(content)
        level.poll()
        level.poll()
        assert not level.pending
        request_level(run, "norms")
        level.poll()
        assert level.taken() == "norms"
    damaged, _ = open_trace(run).events
    assert CONTROL in damaged.text


def test_nobody_answers(run: Path, writers: list[TraceWriter], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "PATIENCE", 0.2)
    status, out, err = call("attach", run, "--keep", "norms", capsys=capsys)
    assert (status, out) == (2, "")
    assert f"error: `vllm-rank-0` (process {os.getpid()}) did not answer within 0.2 s" in err


def test_a_closed_recording(run: Path, capsys: Any) -> None:
    TraceWriter(run / "vllm-rank-0", process()).close()
    status, out, err = call("attach", run, "--keep", "norms", capsys=capsys)
    assert (status, out) == (2, "")
    assert f"error: the recording in `{run}` is closed" in err
    assert not (run / CONTROL).exists()


def test_a_process_that_is_gone(run: Path, capsys: Any) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for rank, pid in enumerate((ended.pid, 0, -1, 2**40)):
        writer = TraceWriter(run / f"vllm-rank-{rank}", process(rank))
        writer.describe(pid=pid)
        writer.close(complete=False)
    status, out, err = call("attach", run, "--keep", "norms", capsys=capsys)
    assert (status, out) == (2, "")
    assert f"does not run on this machine any more (process {ended.pid}, 0, -1, {2**40})" in err
    assert not (run / CONTROL).exists()


def test_a_request_that_cannot_be_answered_is_logged_once_and_answered_later(
    run: Path, writers: list[TraceWriter], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the worker is gone for a while."""
    monkeypatch.setattr(watcher, "SECONDS", 0.02)
    level = RequestedLevel(writers[0])
    thread = Watcher(level.poll)
    folder, away = writers[0].folder, run / "away"
    folder.rename(away)
    control = request_level(run, "norms")
    eventually(lambda: bool(caplog.records))
    time.sleep(0.2)
    away.rename(folder)
    process = folder / "process.json"
    eventually(lambda: json.loads(process.read_text())["control"] == control.request)
    thread.close()
    assert len(caplog.records) == 1


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_trace_and_no_worker(run: Path, capsys: Any) -> None:
    assert call("attach", run, "--keep", "norms", capsys=capsys)[0] == 2
    TraceWriter(run / "client", process(role="client")).close()
    status, _, err = call("attach", run, "--keep", "norms", capsys=capsys)
    assert status == 2
    assert "no engine has recorded into" in err
    status, _, err = call("attach", run, "--keep", "all", capsys=capsys)
    assert status == 2
    assert "invalid choice: 'all'" in err
