"""An engine that compiles its model: sampled steps run eager, and the other rows are counted.

It has the V2 runner, as on a GPU, unless the environment selects V1, which `make matrix` does.
"""

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

pytestmark = [pytest.mark.engine, pytest.mark.wide]

V2 = Path(__file__).parent / "v2"
RUNNER = "V1" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0" else "V2"
MODULES = 3 * LAYERS
ROWS = 4 * (20 + 24 - 1)
"""Four requests of 20 tokens with the adapter, and 24 answered tokens, the last of which is never run."""


def run(base: Path, adapter: Path, *traces: str, sample: str) -> list[list[list[int]]]:
    """The answers of compiled engines that are started in turn."""
    settings = {
        "PYTHONPATH": str(V2),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0" if RUNNER == "V1" else "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "LORA_PROBE_SAMPLE": sample,
    }
    command = [sys.executable, str(V2 / "compiled.py"), str(base), str(adapter), *traces]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]


def test_a_compiled_engine_is_observed_in_sampled_steps(llama: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run.lptrace"
    plain, recorded = run(llama, adapter, "-", str(folder), sample="20")
    assert recorded == plain
    trace = open_trace(folder)
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"
    settings = trace.workers[0].process.settings
    assert (settings["model_runner"], settings["sample"]) == (RUNNER, 20)
    assert "DYNAMO_TRACE_ONCE" in settings["compiled"]
    counted = [event for event in trace.events if event.stage == "graphs"][-1]
    observed = int((trace.rows.load == 0).sum())
    assert observed + counted.facts["rows"] == ROWS
    # The first prefill and four steps of the first two requests at least, and fewer than half of all rows.
    assert 2 * (20 + 4) <= observed < ROWS / 2
    assert counted.facts["wrong"] == 0
    assert counted.text.endswith("not observed; their mapping to the slot was right")
    assert (trace.rows.delta_norm[trace.rows.load == 0] > 0).all()
