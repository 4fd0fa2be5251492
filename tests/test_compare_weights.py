"""`compare` of two runs of one adapter whose engines multiply with other weights: by which factor, and what it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, call, record_peft
from test_compare_runs import HEALTHY, Served, record

from lora_probe import compare, open_trace
from lora_probe.comparison.weights import _lost_digits, limits, relate
from lora_probe.recording import ModuleRecord, NamedAdapter
from lora_probe.recording.fingerprint import fingerprint

EVERY = range(3)


def compared(tmp_path: Path, candidate: Served, **of_process: Any) -> Any:
    one, two = record(tmp_path / "one", **of_process), record(tmp_path / "two", candidate, **of_process)
    return compare(open_trace(one), open_trace(two))


FACTORS: list[tuple[float, str]] = [
    (2.0, "2 times that of the reference in all 3 modules (the scaling 2 was applied twice, or not in the reference)"),
    (
        0.5,
        "0.5 times that of the reference in all 3 modules (the scaling 2 was not applied, or twice in the reference)",
    ),
    (math.sqrt(8), "2.828 times that of the reference in all 3 modules (√r = 2.828: alpha/√r (rsLoRA) against"),
    (1 / math.sqrt(8), "(1/√r = 0.3536: alpha/r against alpha/√r (rsLoRA) in the reference)"),
    (0.0, "0 times that of the reference in all 3 modules (it is zero)"),
    (1.25, "1.25 times that of the reference in all 3 modules"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("factor", "words"), FACTORS)
def test_a_factor_of_all_modules_and_what_it_is(factor: float, words: str, dtype: str, tmp_path: Path) -> None:
    engine = replace(HEALTHY, rank=8, in_slot=dict.fromkeys(EVERY, factor))
    one = record(tmp_path / "one", replace(HEALTHY, rank=8), dtype=dtype)
    result = compare(open_trace(one), open_trace(record(tmp_path / "two", engine, dtype=dtype)))
    (difference,) = result.weights
    assert words in difference.text
    assert result.verdict == "differ"
    assert difference.factors == pytest.approx((factor, factor), rel=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_percent_of_one_module(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bfloat16 no module exceeds the tolerance: without the factor the traces would agree."""
    one = record(tmp_path / "one", dtype=dtype)
    two = record(tmp_path / "two", replace(HEALTHY, in_slot={1: 1.01}), dtype=dtype)
    status, out, _ = call("compare", one, two, capsys=capsys)
    assert status == 1
    assert "cause (LP621 weights-at-another-scale): s·B·A is 1.01 times that of the reference in 1 of 3 modules" in out
    _, out, _ = call("compare", one, two, "--format", "json", capsys=capsys)
    (weights,) = json.loads(out)["weights"]
    assert weights["factors"] == pytest.approx([1.01, 1.01], rel=1e-4)
    assert [module["module"] for module in weights["modules"]] == ["model.layers.1.self_attn.q_proj"]


def test_several_factors_are_several_causes(tmp_path: Path) -> None:
    result = compared(tmp_path, replace(HEALTHY, in_slot={0: 2.0, 1: 1.1, 2: 2.0}))
    assert [len(difference.keys) for difference in result.weights] == [2, 1]


@pytest.mark.parametrize(("factor", "dtype"), [(1 + 2**-9, "bfloat16"), (1 + 1e-7, "float32")])
def test_rounding_is_no_factor(factor: float, dtype: str, tmp_path: Path) -> None:
    assert compared(tmp_path, replace(HEALTHY, in_slot=dict.fromkeys(EVERY, factor)), dtype=dtype).weights == ()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scaling", [0.7, 1.5, 4 / 3, 2.0, 32**0.5])
@pytest.mark.parametrize("kind", ["constant", "one value", "one output", "tiny", "usual"])
def test_a_rounded_b_is_no_difference(kind: str, scaling: float, dtype: str) -> None:
    """PEFT in float32 against vLLM in 16 bits, which rounds B, and s·B again."""
    import torch

    numbers = torch.Generator().manual_seed(1)
    shape = {"constant": (64, 1), "one output": (1, 1)}.get(kind, (512, 8))
    a = np.random.default_rng(2).normal(size=(shape[1], 96)).astype(np.float32)
    for _ in range(40):
        b = torch.randn(shape, generator=numbers)
        if kind == "constant":
            b = torch.full(shape, 1 + 2**-8 + 1e-5)
        elif kind == "one value":
            b = b * (torch.arange(b.numel()).reshape(shape) == 5)
        elif kind == "tiny":
            b = b * 1e-6
        rounded = (b.to(getattr(torch, dtype)) * scaling).float()
        halves = [np.asarray(weights.numpy()) for weights in (b * scaling, rounded)]
        module = ModuleRecord(0, "q", "weight", None, ["file"], rank=shape[1], scaling=scaling)
        relation = relate(*(fingerprint(a, half).product for half in halves))
        assert relation is not None
        slack, rest = limits(dtype)
        lost = _lost_digits([half.T @ half for half in halves], module, dtype)
        assert abs(relation.factor - 1) <= slack + lost
        assert relation.rest <= rest + 2 * lost


def test_other_weights_have_no_factor(tmp_path: Path) -> None:
    (difference,) = compared(tmp_path, replace(HEALTHY, turned={2})).weights
    assert (difference.kind, difference.factors) == ("other", None)
    assert difference.text.startswith("s·B·A is another one in 1 of 3 modules (layer 2 q_proj)")


@pytest.mark.parametrize("other", [{"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_other_files_are_explained_by_the_files(other: dict[str, Any], tmp_path: Path) -> None:
    result = compared(tmp_path, replace(HEALTHY, scaling=8.0, digest="e"), **other)
    assert result.weights == ()
    assert result.adapters


Damage = Callable[[Any], None]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_percent_in_an_engine(
    dtype: str, adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT with another scaling in one live layer, in both directions; the same run again is no difference."""
    from lora_probe.engines.peft import engine

    options = {"dtype": dtype, "lora_dtype": dtype}
    healthy, again = (
        record_peft(adapter, llama, tmp_path / name, prompts=["hi"], max_tokens=3, options=options)
        for name in ("healthy", "again")
    )
    original = engine.attach

    def attach(model: Any, named: NamedAdapter, *rest: Any) -> Any:
        attached = original(model, named, *rest)
        slot = list(attached.slots.values())[4]
        slot.layer.scaling[slot.adapter] *= 1.01
        return attached

    monkeypatch.setattr(engine, "attach", attach)
    damaged = record_peft(adapter, llama, tmp_path / "damaged", prompts=["hi"], max_tokens=3, options=options)
    assert compare(healthy, again).verdict == "agree"
    for reference, candidate, factor in ((healthy, damaged, 1.01), (damaged, healthy, 1 / 1.01)):
        (difference,) = compare(reference, candidate).weights
        assert difference.factors == pytest.approx((factor, factor), rel=2e-3)
        assert (len(difference.keys), difference.total) == (1, 3 * LAYERS)
