"""`show` of a server's trace: a section for each adapter, from its own rows, while the server runs and afterwards."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import traces
from conftest import call, heed_interrupts
from served import NONE, A, B, Served, judge, loaded, mixed, server, step
from test_terminal import in_terminal
from test_trace_format import KEYS

from lora_probe.ledger import Finding
from lora_probe.recording import TraceWriter

WRONG = Finding("wrong", "LP504", "the slot differs from the file")
ABSENT = Finding("absent", "LP501", "its name is unknown")


def shown(trace: Path, *options: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status, out, err = call("show", trace, *options, capsys=capsys)
    assert err == ""
    return status, out


def as_json(trace: Path, *options: object, capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(shown(trace, *options, "--format", "json", capsys=capsys)[1])


def table(out: str, load: int) -> list[list[str]]:
    """The cells of the contributions of one load."""
    _, _, rest = out.partition(f"over the rows of load {load}\n")
    return [
        line.split() for line in rest.split("\n\n")[0].splitlines() if line[:1].isdigit() or line.startswith("layer")
    ]


def test_contributions_are_those_of_one_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = mixed(tmp_path / "run", A, B)
    status, out = shown(trace, capsys=capsys)
    assert status == 0
    assert "A (load 0): 4 of 4 modules took effect" in out
    assert table(out, 0) == [["layer", "q_proj", "k_proj"], ["0", "0.7", "0.7"], ["1", "0.7", "0.7"]]
    assert table(out, 1) == [["layer", "q_proj"], ["0", "0.2"], ["1", "0.2"]]
    assert "5 rows of 1 request" in out
    data = as_json(trace, capsys=capsys)
    assert [adapter["name"] for adapter in data["adapters"]] == ["A", "B"]
    strengths = [{module["strength"] for module in load["modules"]} for load in data["loads"]]
    assert [sorted(round(value, 6) for value in of_load) for of_load in strengths] == [[0.7], [0.2]]
    assert [load["rows"] for load in data["loads"]] == [5, 5]
    # What there is of one load only is that of the first one.
    assert data["modules"] == data["loads"][0]["modules"]
    assert data["headline"] == "4 of 4 modules took effect"


def test_a_fault_of_one_adapter_marks_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = mixed(tmp_path / "run", A, replace(B, fault=WRONG))
    status, out = shown(trace, capsys=capsys)
    assert status == 1
    assert table(out, 0)[2] == ["1", "0.7", "0.7"]
    assert table(out, 1)[2] == ["1", "0.2", "wrong"]
    assert shown(trace, "--adapter", "A", capsys=capsys)[0] == 0
    assert shown(trace, "--adapter", "B", capsys=capsys)[0] == 1


def test_the_heading_names_all_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = mixed(tmp_path / "run", A, B)
    lines = shown(trace, capsys=capsys)[1].splitlines()
    assert lines[0] == "A: 4 of 4 modules took effect; B: 2 of 2 modules took effect"
    assert lines[-3:] == [
        "adapters  A and B",
        "model     /models/base, model runner V1, eager",
        "run in    float32 on cpu, kept: norms",
    ]


def test_many_loads_of_one_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = mixed(tmp_path / "run", *(replace(A, number=number, strength=0.1 * (number + 1)) for number in range(14)))
    out = shown(trace, capsys=capsys)[1]
    assert out.count("contribution") == 1
    assert table(out, 13)[1] == ["0", "1.4", "1.4"]
    assert re.search(r"load 12: at [0-9.]+ s, generation 12, AAAAAAAA\.\.\.0000000c: 4 of 4 modules took effect", out)
    assert "load 2:" not in out
    assert "... and 3 other loads; --all prints all of them" in out
    every = shown(trace, "--all", capsys=capsys)[1]
    assert "load 0:" in every
    assert "other loads" not in every
    only = shown(trace, "--load", "2", capsys=capsys)[1]
    assert "A (load 2): 4 of 4 modules took effect" in only
    assert table(only, 2)[1] == ["0", "0.3", "0.3"]
    assert "load 1:" not in only


def test_a_load_that_nothing_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unused = Served(2, "C")
    with server(tmp_path / "run") as writer:
        loaded(writer, A)
        loaded(writer, unused)
        writer.rows(step(("a", A, range(4), 4)))
        judge(writer, A, ("applied", "agrees"))
        writer.flush()
        out = shown(tmp_path / "run", capsys=capsys)[1]
    section = out.partition("C (load 2): ")[2].split("\n\n")[0]
    assert section == "4 of 4 modules are placed; no request yet"


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--adapter", "C"], "no adapter `C` in this trace", "adapters in this trace: `A` and `B`"),
        (["--load", "7"], "no load 7 in this trace", "loads in this trace: 0, 1"),
        (["--adapter", "B", "--load", "0"], "no load 0 of `B` in this trace", "loads of `B` in this trace: 1"),
    ],
)
def test_what_the_trace_does_not_have(
    tmp_path: Path, options: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = mixed(tmp_path / "run", A, B)
    status, out, err = call("show", trace, *options, capsys=capsys)
    assert (status, out) == (2, "")
    assert err == f"error: {message}\nhint: {hint}\n"
    error = json.loads(call("show", trace, *options, "--format", "json", capsys=capsys)[1])["error"]
    assert error == {"message": message, "hint": hint}


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """B: the first block of its prompt came from the prefix cache. A: a preemption, after which 6 rows ran again."""
    with server(tmp_path / "run") as writer:
        loaded(writer, A)
        loaded(writer, B)
        writer.rows(step(("a", A, range(6), 5), ("b", B, range(32, 40), 40), ("c", NONE, range(3), 3)))
        writer.rows(step(("a", A, range(7), 5), ("b", B, range(40, 42), 40)))
        for served in (A, B):
            judge(writer, served, ("applied", "agrees"))
    return tmp_path / "run"


def test_requests(requests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = shown(requests, "--requests", capsys=capsys)
    assert status == 0
    requests_table = out.partition("requests by their recorded rows: all 3\n")[2].partition("\n\n")[0]
    lines = [line.split() for line in requests_table.splitlines()]
    # Rows of one step may be in different segments, so requests that began together have no order.
    assert [lines[0], *sorted(lines[1:])] == [
        ["request", "adapter", "load", "prompt", "rows", "positions", "from", "cache", "decode", "repeated"],
        ["a", "A", "0", "5", "7", "0-6", "-", "2", "6"],
        ["b", "B", "1", "40", "10", "32-41", "32", "2", "-"],
        ["c", "none", "-", "-", "3", "0-2", "-", "-", "-"],
    ]
    assert "contribution" not in out
    data = as_json(requests, "--requests", capsys=capsys)
    by_id = {request["id"]: request for request in data["request_rows"]}
    assert by_id["b"] == {
        "id": "b",
        "adapters": ["B"],
        "loads": [1],
        "prompt_tokens": 40,
        "rows": 10,
        "first": 32,
        "last": 41,
        "from_cache": 32,
        "missing": 0,
        "decode": 2,
        "repeated": 0,
        "cached_loads": None,
        "preemptions": 0,
    }
    assert sorted(by_id) == ["a", "b", "c"]
    assert as_json(requests, capsys=capsys)["request_rows"] is None
    only = as_json(requests, "--requests", "--adapter", "A", capsys=capsys)
    assert [request["id"] for request in only["request_rows"]] == ["a"]


def test_rows_that_ran_again_count_once(requests: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = as_json(requests, "--load", "0", capsys=capsys)["loads"][0]
    assert load["rows"] == 7
    assert {module["rows"] for module in load["modules"]} == {7}


def test_positions_that_no_cache_explains_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(tmp_path / "run", settings={"enable_prefix_caching": False}) as writer:
        loaded(writer, A)
        writer.rows(step(("a", A, range(2, 4), 8)))
        writer.rows(step(("a", A, range(6, 10), 8)))
    (request,) = as_json(tmp_path / "run", "--requests", capsys=capsys)["request_rows"]
    assert (request["from_cache"], request["missing"], request["prompt_tokens"]) == (0, 4, 8)


def test_the_last_of_many_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(tmp_path / "run") as writer:
        loaded(writer, A)
        for number in range(60):
            writer.rows(step((f"request-{number}", A, range(2), 2)))
    out = call("show", tmp_path / "run", "--requests", capsys=capsys)[1]
    assert "the last 50 of 60; --all prints all of them" in out
    assert "request-9 " not in out
    assert "request-59" in out
    every = call("show", tmp_path / "run", "--requests", "--all", capsys=capsys)[1]
    assert "request-0 " in every


def test_a_server_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has not failed because nothing was asked of it yet."""
    trace = tmp_path / "run"
    writer = server(trace)
    status, out = shown(trace, capsys=capsys)
    assert (status, "no adapter has been loaded yet" in out) == (0, True)
    assert "error" not in as_json(trace, capsys=capsys)
    loaded(writer, A)
    status, out = shown(trace, capsys=capsys)
    assert status == 0
    assert "running: no request yet" in out
    assert "A (load 0): 4 of 4 modules are placed; no request yet" in out
    assert "ended" not in out
    assert "incomplete" not in out
    data = as_json(trace, capsys=capsys)
    assert (data["running"], data["complete"]) == (True, False)
    assert data["loads"][0]["ledger"]["unknown"] == 4
    assert {module["message"] for module in data["loads"][0]["ledger"]["modules"]} == {"no request yet"}
    writer.rows(step(("a", A, range(4), 4)))
    writer.flush()
    assert "4 of 4 modules are placed; not measured yet" in shown(trace, capsys=capsys)[1]
    judge(writer, A, ("applied", "agrees"))
    status, out = shown(trace, capsys=capsys)
    assert status == 0
    assert "running: 4 rows so far" in out
    assert "A (load 0): 4 of 4 modules took effect" in out
    loaded(writer, replace(B, fault=ABSENT), ("stored", "read"))
    status, out = shown(trace, capsys=capsys)
    assert status == 1
    assert "1 lost at stored" in out
    writer.close()


def test_a_running_server_that_records_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "run"
    writer = server(trace, keep="events")
    loaded(writer, A)
    status, out = shown(trace, capsys=capsys)
    assert (status, "4 of 4 modules are placed; contributions are not recorded at level events" in out) == (0, True)
    writer.describe(keep="norms", not_recorded="an unknown runner")
    status, out = shown(trace, capsys=capsys)
    assert (status, "unknown from applied on: contributions are not recorded: an unknown runner" in out) == (1, True)
    writer.close()


def test_a_server_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    loaded(server(tmp_path / "run", pid=int(ended.stdout)), A)
    status, out = shown(tmp_path / "run", capsys=capsys)
    assert status == 1
    assert "incomplete: vllm-rank-0 did not exit cleanly" in out
    assert "the recording ended before it was measured" in out


def test_rows_in_captured_graphs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last count of each load."""
    settings = {"model": "m", "model_runner": "V2", "compiled": "replays graphs", "sample": 200}
    with server(tmp_path / "run", settings=settings) as writer:
        loaded(writer, A)
        loaded(writer, B)
        for count in (7, 412):
            writer.event("graphs", f"{count} rows ran in captured graphs", load=0, rows=count, wrong=0)
    _, out, _ = call("show", tmp_path / "run", capsys=capsys)
    assert "model     m, model runner V2, the engine replays graphs, one step in 200 is run eager and observed" in out
    assert out.count("rows ran in captured graphs") == 1
    assert "412 rows ran in captured graphs" in out.partition("A (load 0)")[2].partition("B (load 1)")[0]
    loads = as_json(tmp_path / "run", capsys=capsys)["loads"]
    assert [load["graphs"] for load in loads] == ["412 rows ran in captured graphs", None]


def test_tables_of_many_adapters_are_shown_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [Served(number, f"{chr(65 + number)}") for number in range(11)]
    trace = mixed(tmp_path / "run", *many)
    status, out = shown(trace, capsys=capsys)
    assert status == 0
    assert out.startswith("11 adapters: 4 of 4 modules took effect\n")
    assert out.count("modules took effect") == 12
    assert "contribution" not in out
    assert "contribution" in shown(trace, "--adapter", "C", capsys=capsys)[1]
    assert shown(trace, "--all", capsys=capsys)[1].count("contribution") == 11


PEAK = (
    "import resource, sys\n"
    "from lora_probe.cli.main import run\n"
    "run(['show', *sys.argv[1:]])\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
)


def test_columns_that_are_not_shown_are_not_read(tmp_path: Path) -> None:
    """Whole tensors are 94 MB on disk."""

    def peak(trace: Path) -> int:
        run = subprocess.run([sys.executable, "-c", PEAK, str(trace)], capture_output=True, text=True, check=True)
        assert "2 of 2 modules took effect" in run.stdout
        return int(run.stdout.splitlines()[-1])

    small, large = traces.write(tmp_path / "small"), traces.write(tmp_path / "large")
    wide = {key: np.zeros((4, 2_000_000), np.float32) for key in KEYS}
    with TraceWriter(tmp_path / "wide" / "peft", traces.process()) as writer:
        writer.rows(replace(traces.whole(8), x=wide, base=None, delta=None))
    (tmp_path / "wide/peft/000001.safetensors").rename(large / "peft" / "000003.safetensors")
    process = large / "peft" / "process.json"
    process.write_text(process.read_text().replace('"segments": 2', '"segments": 3'))
    assert peak(large) < peak(small) + 20


# Following.


def follower(trace: Path, *options: str, stdout: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lora_probe", "show", str(trace), "--follow", *options]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)


def line_of(run: subprocess.Popen[str]) -> str:
    assert run.stdout is not None
    return run.stdout.readline().rstrip("\n")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_follow_in_a_pipe_ends_with_the_recording(tmp_path: Path) -> None:
    writer = server(tmp_path / "run")
    with follower(tmp_path / "run") as run:
        assert line_of(run) == "no adapter has been loaded yet"
        loaded(writer, A)
        assert line_of(run) == "A (load 0): 4 of 4 modules are placed; no request yet"
        writer.rows(step(("a", A, range(4), 4)))
        judge(writer, A, ("applied", "agrees"))
        assert line_of(run) == "A (load 0): 4 of 4 modules took effect"
        loaded(writer, replace(A, number=1), ("stored", "read", "placed", "applied", "agrees"))
        assert line_of(run) == "A (load 1): 4 of 4 modules took effect"
        writer.close()
        out, err = run.communicate(timeout=30)
    assert (run.returncode, out, err) == (0, "", "")


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("format", ["text", "json"])
def test_follow_ends_with_an_interrupt(tmp_path: Path, format: str) -> None:
    writer = server(tmp_path / "run")
    loaded(writer, A)
    with (tmp_path / "out").open("w+") as out:
        run = follower(tmp_path / "run", "--format", format, stdout=out)
        while not (text := (tmp_path / "out").read_text()).endswith(("yet\n", "}\n")):
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        assert (run.wait(30), run.communicate()[1]) == (0, "")
    headline = "4 of 4 modules are placed; no request yet"
    if format == "json":
        assert json.loads(text)["adapters"][0]["headline"] == headline
    else:
        assert text == f"A (load 0): {headline}\n"
    writer.close()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_follow_ends_when_the_process_is_killed(tmp_path: Path) -> None:
    """It changes no file any more."""
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import served\n"
        "writer = served.server(Path(sys.argv[2])); served.loaded(writer, served.A)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as recorder:
        assert line_of(recorder) == "ready"
        with follower(tmp_path / "run") as run:
            line_of(run)
            recorder.kill()
            assert run.communicate(timeout=30)[1] == ""
    assert run.returncode == 1


@pytest.mark.slow
def test_follow_of_a_complete_trace_in_a_terminal(tmp_path: Path) -> None:
    out = in_terminal("show", mixed(tmp_path / "run", A, B), "--follow", TERM="xterm", LINES="40")
    assert "A (load 0): 4 of 4 modules took effect" in out
    assert "drawn again when the recording changes" in out
