"""Traces with very many steps and loads: what is shown, and in how much time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import call
from test_trace_format import KEYS
from traces import write

from lora_probe import open_trace
from lora_probe.recording import Load, ModuleRecord, StationRecord


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path / "long.lptrace")


def tell(trace: Path, count: int, event: Callable[[int], dict[str, Any]]) -> None:
    with (trace / "peft" / "events.jsonl").open("a") as file:
        for number in range(count):
            file.write(json.dumps({"kind": "event", "at": 1, "stage": "put", **event(number)}) + "\n")


def test_a_long_story_is_cut(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(trace, 300, lambda n: {"text": f"step {n}."})
    tell(trace, 300, lambda n: {"text": "all alike", "module": f"layers.{n}.q_proj"})
    out = call("show", trace, capsys=capsys)[1]
    assert "step 198." in out
    assert "step 199." not in out
    assert "102 more lines; --events prints all of them" in out
    out = call("show", trace, "--events", capsys=capsys)[1]
    assert "step 299." in out
    assert out.count("all alike") == 300
    assert "more lines" not in out


def test_steps_on_modules_are_one_line_until_another_step(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        tell(trace, 6, lambda n: {"text": f"slot {n % 2}", "module": f"layers.{n}.q_proj"})
        tell(trace, 1, lambda n: {"text": "done"})
    out = call("show", trace, capsys=capsys)[1]
    told = [" ".join(line.split()[2:]) for line in out.splitlines() if line.startswith("1.000 s")]
    groups = ["put 3: layers 0, 2, 4 q_proj slot 0", "put 3: layers 1, 3, 5 q_proj slot 1", "put done"]
    assert told == groups * 2


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["one text each", "one module each"])
def test_a_million_steps(trace: Path, kind: str) -> None:
    if kind == "one text each":
        tell(trace, 10**6, lambda n: {"text": str(n), "module": "m"})
    else:
        tell(trace, 10**6, lambda n: {"text": "", "module": f"layers.{2 * n}.m{n}"})
    script = (
        "import sys\n"
        "from lora_probe.recording.reader import open_trace\n"
        "from lora_probe.render.formats import present\n"
        "from lora_probe.render.results import Recording\n"
        "present('show', 'text', Recording(open_trace(sys.argv[1])))\n"
        "line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(line.split()[1]) // 1024)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, str(trace)], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 60
    assert int(done.stdout.splitlines()[-1]) < 1024


def test_many_loads_take_linear_time(trace: Path) -> None:
    with (trace / "peft" / "events.jsonl").open("ab") as file:
        for number in range(1, 10_000):
            for record in (
                Load(number, "a", "/a", "d"),
                ModuleRecord(number, *KEYS[0], ["file"]),
                StationRecord(number, "stored", "ok", [KEYS[0]]),
            ):
                file.write(msgspec.json.encode(record) + b"\n")
    started = time.monotonic()
    assert len(open_trace(trace).loads) == 10_000
    assert time.monotonic() - started < 20
