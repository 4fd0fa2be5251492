"""`compare --bisect` in vLLM: workers exchange the weights of both runs in a slot, module by module."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SharedEngine, call, record_peft, start_engine
from faults import ATTENTION, FILES, Expected, SlotFault, damaged_slots
from written import edited

from lora_probe import compare
from lora_probe.comparison import bisection
from lora_probe.engines.mixtures import Bisected, BisectSpec, search
from lora_probe.recording import SCHEMA, Process, TraceWriter

pytestmark = pytest.mark.engine
PROMPTS = ["hello there"]


@pytest.fixture(scope="session")
def roomy(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> SharedEngine:
    """An engine with slots for both adapters."""
    return start_engine(llama, tmp_path_factory.mktemp("roomy") / "first.lptrace", max_loras=2)


def in_engine(engine: SharedEngine, folder: Path) -> Callable[..., Bisected]:
    """What the process of a bisection does, in an engine that runs already, with what is patched in it."""

    def run(spec: BisectSpec, progress: object) -> Bisected:
        from lora_probe_vllm.bisect import Mixture

        assert spec.engine == "vllm"
        engine.llm.collective_rpc("lora_probe_begin", args=(str(folder / "workers"), "events"))
        process = Process(SCHEMA, role="bisect", engine="vllm", rank=0, pid=1, versions={})
        try:
            with TraceWriter(folder / "bisect", process) as writer:
                return search(spec, Mixture(engine.llm, spec).next_token, writer)
        finally:
            engine.llm.collective_rpc("lora_probe_finish")
            for number in (1, 2):
                engine.llm.llm_engine.remove_lora(number)

    return run


def other_sign(adapter: Path, folder: Path) -> Path:
    """All B differ a little, and one has another sign."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        little = {n: t * np.float32(1.001) if "lora_B" in n else t for n, t in tensors.items()}
        return FILES["another sign"].tensors(little)

    return edited(adapter, folder, change)


def test_a_slot_that_changes_the_answer(
    adapter: Path, llama: Path, roomy: SharedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is right, and what vLLM held is in no file: only the slots of a live engine can be exchanged."""
    fault = SlotFault(Expected("LP622"), overwritten)
    healthy = record_peft(adapter, llama, tmp_path / "healthy", prompts=PROMPTS, max_tokens=3)
    with damaged_slots(fault):
        wrong = roomy.record(adapter, tmp_path / "wrong", prompts=PROMPTS, max_tokens=3)
        comparison = compare(healthy, wrong)
        assert comparison.outputs.first_token is not None
        monkeypatch.setattr(bisection, "run", in_engine(roomy, tmp_path))
        result = bisection.bisect(comparison, 50)
    assert result.modules == (ATTENTION.format(1, "v_proj"),)
    assert (result.engine, result.minimal, result.explained) == ("vllm", True, True)
    assert "in vLLM" in result.text


def overwritten(layers: dict[int, Any], slot: int) -> None:
    """One module gets large random numbers, and two others slightly different ones."""
    import torch

    generator = torch.Generator().manual_seed(3)
    held = layers[1].lora_b_stacked[2][slot]
    held.copy_(torch.randn(held.shape, generator=generator) * 0.5)
    for number in (0, 2):
        held = layers[number].lora_b_stacked[0][slot]
        held.add_(torch.randn(held.shape, generator=generator) * 1e-4)


def test_two_files_in_a_process_of_its_own(
    adapter: Path, engine: SharedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both runs are vLLM's, so vLLM runs the mixtures; PEFT finds the same if it is asked for."""
    wrong = other_sign(adapter, tmp_path / "edited")
    traces = [
        engine.record(folder, tmp_path / name, prompts=PROMPTS, max_tokens=3)
        for name, folder in (("healthy", adapter), ("wrong", wrong))
    ]
    command = ("compare", *(trace.path for trace in traces), "--bisect", "--format", "json")
    status, out, error = call(*command, capsys=capsys)
    assert status == 1, error
    by_vllm = json.loads(out)["bisection"]
    assert by_vllm["modules"] == [ATTENTION.format(1, "v_proj")]
    assert (by_vllm["engine"], by_vllm["total"], by_vllm["minimal"]) == ("vllm", 9, True)
    assert "starting vLLM" in error
    status, out, error = call(*command, "--bisect-engine", "peft", capsys=capsys)
    by_peft = json.loads(out)["bisection"]
    assert by_peft["engine"] == "peft"
    assert by_peft["modules"] == by_vllm["modules"]


def test_a_lost_module_in_a_process_of_its_own(
    adapter: Path, engine: SharedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The candidate's slot is empty where its names are dead."""
    dead = edited(adapter, tmp_path / "dead", FILES["a layer of other names"].tensors)
    traces = [
        engine.record(folder, tmp_path / name, prompts=PROMPTS, max_tokens=3)
        for name, folder in (("healthy", adapter), ("lost", dead))
    ]
    status, out, error = call("compare", *(t.path for t in traces), "--bisect", "--format", "json", capsys=capsys)
    assert status == 1, error
    result = json.loads(out)
    assert result["bisection"] is not None, result["notes"]
    lost = {ATTENTION.format(1, name) for name in ("q_proj", "k_proj", "v_proj")}
    assert set(result["bisection"]["modules"]) <= lost
    assert result["bisection"]["to"] == result["bisection"]["candidate"]
