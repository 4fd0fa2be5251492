"""Adapters of experts in vLLM: slots, rows and contributions of each expert, by its number.

vLLM's own kernels for experts run in Triton's interpreter, on the runner that the environment selects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import LAYERS
from written import edited, write_adapter, write_base

from lora_probe import check, open_trace
from lora_probe.ledger import Ledger, headline
from lora_probe.recording import LoadEvent, Trace

pytestmark = pytest.mark.engine

V2 = Path(__file__).parent / "v2"
TARGETS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
MODULES = LAYERS * (3 + 4 * 3)
LAYER = "model.layers.1.mlp.experts"
NUMBERED = f"base_model.model.{LAYER}"


class Served(NamedTuple):
    """What the engine answered without and with the probe, and the trace."""

    plain: dict[str, Any]
    recorded: dict[str, Any]
    trace: Trace


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    base = write_base(folder / "base", "moe")
    each = write_adapter(folder / "each", base, target_modules=TARGETS)
    incomplete = edited(
        each,
        folder / "incomplete",
        lambda tensors: {name: t for name, t in tensors.items() if f"{NUMBERED}.2.up_proj." not in name},
    )
    only = edited(
        each,
        folder / "only",
        lambda tensors: {name: t for name, t in tensors.items() if ".experts." in name},
        lambda raw: raw | {"target_modules": TARGETS[3:]},
    )
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    fused = edited(
        each,
        folder / "fused",
        lambda tensors: {n: t for n, t in tensors.items() if ".experts." not in n} | fused_pairs(),
        lambda raw: raw | {"target_modules": TARGETS[:3], "target_parameters": parameters},
    )
    return {"base": base, "each": each, "incomplete": incomplete, "only": only, "fused": fused}


def fused_pairs() -> dict[str, Any]:
    """Pairs as PEFT writes them: in A `[experts·r, in]` the expert runs slowest, in B `[out, r·experts]` fastest."""
    numbers = np.random.default_rng(1)
    up, down = {"lora_A": (32, 128), "lora_B": (128, 32)}, {"lora_A": (32, 64), "lora_B": (128, 32)}
    shapes = {f".base_layer.{half}": shape for half, shape in up.items()} | {f".{half}": s for half, s in down.items()}
    return {
        f"base_model.model.model.layers.{layer}.mlp.experts{half}.weight": numbers.normal(0, 0.05, shape).astype("f4")
        for layer in range(LAYERS)
        for half, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def served(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("traces") / "run.lptrace"
    each = str(adapters["each"])
    faults = ("", "swapped", "half", "kernel")
    cases = [{"name": fault or "healthy", "path": each, "fault": fault, "fused": False} for fault in faults]
    fused = str(adapters["fused"])
    cases += [{"name": f"fused {fault}", "path": fused, "fault": fault, "fused": True} for fault in faults]
    for name in ("only", "incomplete"):
        cases.append({"name": name, "path": str(adapters[name]), "fault": "", "fused": False})
    return serve(adapters["base"], cases, folder, VLLM_ENABLE_V1_MULTIPROCESSING="0")


def serve(
    base: Path,
    cases: list[dict[str, Any]],
    folder: Path,
    ranks: int = 1,
    three_d: bool = False,
    **environment: str,
) -> Served:
    """Run the adapters in an engine of their own."""
    settings = {
        "PYTHONPATH": str(V2),
        "TRITON_INTERPRET": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "LORA_PROBE_KEEP": "shrink",
    }
    wanted: dict[str, Any] = {"base": str(base), "trace": str(folder), "adapters": cases}
    wanted |= {"ranks": ranks, "three_d": three_d}
    done = subprocess.run(
        [sys.executable, str(V2 / "mixture.py")],
        input=json.dumps(wanted),
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    plain, recorded = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return Served(plain, recorded, open_trace(folder))


@pytest.mark.wide
def test_two_ranks(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Every rank has a part of each expert, and all pairs agree on both."""
    cases = [
        {"name": name, "path": str(adapters[name]), "fault": "", "fused": name == "fused"} for name in ("each", "fused")
    ]
    more = {"KERNELS_OF_EXPERTS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    served = serve(adapters["base"], cases, tmp_path / "run.lptrace", 2, **more)
    assert len(served.trace.workers) == 2
    for name, count in (("each", MODULES), ("fused", LAYERS * (3 + 2))):
        assert headline(ledger_of(served, name)) == f"{count} of {count} modules took effect"
    errors = [
        error
        for worker in served.trace.workers
        for event in worker.of(LoadEvent)
        if event.stage == "agree"
        for module, (error, *_) in event.facts["errors"].items()
        if ".experts" in module
    ]
    assert len(errors) == 2 * LAYERS * (12 + 2)
    assert 0 < max(errors) < 1e-5


@pytest.mark.wide
def test_experts_that_are_one_tensor(adapters: dict[str, Path], tmp_path: Path) -> None:
    """vLLM's other class of layers, which models such as GPT-OSS and Qwen3-VL-MoE have."""
    case = {"name": "fused", "path": str(adapters["fused"]), "fault": "", "fused": True}
    swapped = case | {"name": "swapped", "fault": "swapped"}
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    served = serve(adapters["base"], [case, swapped], tmp_path / "run.lptrace", three_d=True, **more)
    layers = [event.text for event in served.trace.events if "FusedMoE" in event.text]
    assert any("FusedMoE3DWithLoRA" in text for text in layers)
    modules = LAYERS * (3 + 2)
    assert headline(ledger_of(served, "fused")) == f"{modules} of {modules} modules took effect"
    assert "experts 1-2" in headline(ledger_of(served, "swapped"))


def ledger_of(served: Served, name: str) -> Ledger:
    (ledger,) = (ledger for load, ledger in served.trace.loads if load.name == name)
    return ledger


def wrong(ledger: Ledger, station: str) -> set[str]:
    return {row.key[0] for row in ledger.rows if row.stations[station].value == "wrong"}


def test_answers_are_those_without_the_probe(served: Served) -> None:
    assert served.plain.items() <= served.recorded.items()
    assert served.plain["swapped"] != served.plain["healthy"]


def test_every_expert_agrees(served: Served) -> None:
    ledger = ledger_of(served, "healthy")
    assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"
    agreed = next(event for event in served.trace.events if event.stage == "agree")
    errors = {module: error for module, (error, *_) in agreed.facts["errors"].items() if ".experts." in module}
    assert len(errors) == LAYERS * 12
    assert 0 < max(errors.values()) < 1e-5


def test_swapped_experts_are_named_by_their_numbers(served: Served) -> None:
    projections = ("gate_proj", "up_proj", "down_proj")
    expected = {f"{LAYER}.{expert}.{name}" for expert in (1, 2) for name in projections}
    ledger = ledger_of(served, "swapped")
    assert wrong(ledger, "placed") == expected
    assert "layer 1 experts 1-2 gate_proj, up_proj, down_proj" in headline(ledger)


def test_half_a_scaling_in_a_slot_or_in_a_kernel(served: Served) -> None:
    module = f"{LAYER}.3.down_proj"
    assert wrong(ledger_of(served, "half"), "placed") == {module}
    kernel = ledger_of(served, "kernel")
    assert (wrong(kernel, "placed"), wrong(kernel, "agrees")) == (set(), {module})
    assert "layer 1 experts 3 down_proj" in headline(kernel)


def test_fused_experts(served: Served) -> None:
    """One pair for all experts of a parameter: every slice is compared, and the experts that differ are numbered."""
    modules = LAYERS * (3 + 2)
    assert headline(ledger_of(served, "fused ")) == f"{modules} of {modules} modules took effect"
    pairs = {(LAYER, "gate_up_proj"), (LAYER, "down_proj")}
    swapped = [row for row in ledger_of(served, "fused swapped").rows if row.stations["placed"].value == "wrong"]
    assert {row.key[:2] for row in swapped} == pairs
    assert all(row.stations["placed"].message.startswith("experts 1-2: lora_A differs") for row in swapped)
    (half,) = [row for row in ledger_of(served, "fused half").rows if row.stations["placed"].value == "wrong"]
    assert half.key[:2] == (LAYER, "down_proj")
    assert half.stations["placed"].message.startswith("experts 3: s·lora_B differs")
    (kernel,) = [row for row in ledger_of(served, "fused kernel").rows if row.fate == "wrong"]
    assert (kernel.key[:2], kernel.stations["placed"].value) == ((LAYER, "down_proj"), "ok")
    assert kernel.stations["agrees"].code == "LP604"


def test_an_adapter_of_experts_alone(served: Served) -> None:
    ledger = ledger_of(served, "only")
    assert headline(ledger) == f"{LAYERS * 12} of {LAYERS * 12} modules took effect"


def test_a_missing_expert_is_named_before_and_after(served: Served, adapters: dict[str, Path]) -> None:
    assert served.recorded["incomplete"] == "AssertionError"
    ledger = ledger_of(served, "incomplete")
    assert ledger.refused
    (lost,) = (row for row in ledger.rows if row.stations["stored"].value == "absent")
    assert lost.key[0] == f"{LAYER}.2.up_proj"
    report = check(adapters["incomplete"], model=str(adapters["base"]))
    (finding,) = (one for one in report.diagnostics if one.code == "LP309")
    assert "layer 1 experts 2 up_proj" in str(finding)
