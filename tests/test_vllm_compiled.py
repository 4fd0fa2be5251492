"""Engines that compile their model, on both model runners: sampled steps run eager, and the other rows are counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LAYERS

from lora_probe import open_trace
from lora_probe.ledger import headline

pytestmark = pytest.mark.engine

V2 = Path(__file__).parent / "v2"
MODULES = 3 * LAYERS
ROWS = 4 * (20 + 24 - 1)
"""Four requests of 20 tokens with the adapter, and 24 answered tokens, the last of which is never run."""


def run(runner: str, base: Path, adapter: Path, *traces: str, sample: str = "") -> list[list[list[int]]]:
    """The answers of compiled engines that are started in turn."""
    settings = {
        "PYTHONPATH": str(V2),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": runner.removeprefix("V").replace("1", "0").replace("2", "1"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "LORA_PROBE_SAMPLE": sample,
    }
    command = [sys.executable, str(V2 / "compiled.py"), str(base), str(adapter), *traces]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]


@pytest.fixture(scope="module")
def plain_and_recorded(
    llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[list[int]], dict[str, tuple[list[list[int]], Path]]]:
    """The answers without the probe, and for each runner those with it and the trace."""
    folder = tmp_path_factory.mktemp("compiled")
    traces = {runner: folder / f"{runner}.lptrace" for runner in ("V1", "V2")}
    plain, second = run("V2", llama, adapter, "-", str(traces["V2"]), sample="20")
    (first,) = run("V1", llama, adapter, str(traces["V1"]), sample="20")
    return plain, {"V1": (first, traces["V1"]), "V2": (second, traces["V2"])}


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_compiled_engine_is_observed_in_sampled_steps(
    runner: str, plain_and_recorded: tuple[list[list[int]], dict[str, tuple[list[list[int]], Path]]]
) -> None:
    plain, recorded = plain_and_recorded
    answers, folder = recorded[runner]
    trace = open_trace(folder)
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"
    assert answers == plain
    settings = trace.workers[0].process.settings
    assert (settings["model_runner"], settings["sample"]) == (runner, 20)
    assert "DYNAMO_TRACE_ONCE" in settings["compiled"]
    counted = [event for event in trace.events if event.stage == "graphs"][-1]
    observed = int((trace.rows.load == 0).sum())
    assert observed + counted.facts["rows"] == ROWS
    # The first prefill and four steps of the first two requests at least, and fewer than half of all rows.
    assert 2 * (20 + 4) <= observed < ROWS / 2
    assert counted.facts["wrong"] == 0
    assert counted.text.endswith("not observed; their mapping to the slot was right")
    assert (trace.rows.delta_norm[trace.rows.load == 0] > 0).all()
