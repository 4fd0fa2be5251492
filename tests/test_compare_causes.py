"""Causes outside of the adapter's layers: prompts, bases, engines that are not deterministic; and what is no cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, record_peft
from faults import ATTENTION, FILES
from safetensors.numpy import load_file, save_file
from written import edited, write_adapter, write_base

from lora_probe import compare
from lora_probe.comparison import Comparison
from lora_probe.recording import Trace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def healthy(adapter: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    trace: Trace = record_peft(adapter, llama, tmp_path_factory.mktemp("healthy") / "peft")
    return trace


def both_ways(one: Trace, two: Trace) -> list[Comparison]:
    return [compare(one, two), compare(two, one)]


def only_code(comparison: Comparison) -> str:
    """The code of the first cause of a difference."""
    assert comparison.verdict == "differ"
    return comparison.causes[0].code


def base_with(folder: Path, base: Path, **factors: float) -> Path:
    """A copy of a base with some tensors multiplied; `__` stands for a dot in their names."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        tensors[name.replace("__", ".")] *= factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("tensor", "evidence"),
    [("model__layers__1__mlp__down_proj__weight", "tensors"), ("model__embed_tokens__weight", "before any module")],
)
def test_another_base(tensor: str, evidence: str, healthy: Trace, adapter: Path, llama: Path, tmp_path: Path) -> None:
    other = base_with(tmp_path / "base", llama, **{tensor: 1.5})
    candidate = record_peft(adapter, other, tmp_path / "run")
    for comparison in both_ways(healthy, candidate):
        assert only_code(comparison) == "LP627"
        (cause,) = comparison.causes
        told = " ".join((cause.message, *cause.evidence))
        assert evidence in told
        assert f"`{tensor.replace('__', '.')}`" in told


def test_a_template_and_a_tokenizer(healthy: Trace, adapter: Path, llama: Path, tmp_path: Path, capsys: Any) -> None:
    chat = record_peft(adapter, llama, tmp_path / "chat", chat=True)
    for comparison in both_ways(healthy, chat):
        assert only_code(comparison) == "LP626"
        assert any("with its chat template" in line for line in comparison.causes[0].evidence)
    status, out, _ = call("compare", healthy.path, chat.path, capsys=capsys)
    assert status == 1
    assert "cause (LP626 different-prompts): " in out
    other = Path(shutil.copytree(llama, tmp_path / "base"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["e"], words["o"] = words["o"], words["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    candidate = record_peft(adapter, other, tmp_path / "run")
    for comparison in both_ways(healthy, candidate):
        assert only_code(comparison) == "LP626"
        (cause,) = comparison.causes
        assert all("[" in line for line in cause.evidence[:2])


def test_an_engine_that_differs_from_itself(
    healthy: Trace, adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward

    def noisy(self: Any, x: Any) -> Any:
        result = original(self, x)
        return result + 0.05 * torch.randn_like(result)

    prompts = ["hello there", "hello there"]
    steady = record_peft(adapter, llama, tmp_path / "steady", prompts=prompts)
    monkeypatch.setattr(LlamaMLP, "forward", noisy)
    candidate = record_peft(adapter, llama, tmp_path / "run", prompts=prompts)
    for comparison in both_ways(steady, candidate):
        assert only_code(comparison) == "LP628"
        assert {kind for of_run in comparison.repeats for kind in of_run} == {"adapter", "base"}
        errors = [max(of.logprob_error for of in of_run.values()) for of_run in comparison.repeats]
        assert min(errors) == 0
        assert max(errors) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["one percent of one B", "another sign", "k and v of one layer", "alpha", "rsLoRA"])
def test_files_of_qwen2(name: str, dtype: str, qwen2: Path, tmp_path: Path) -> None:
    """Also in bfloat16, where no row shows it."""
    fault, options = FILES[name], {"dtype": dtype, "lora_dtype": dtype}
    adapter = write_adapter(tmp_path / "adapter", qwen2)
    other = edited(adapter, tmp_path / "edited", fault.tensors, fault.config)
    one, two = (
        record_peft(folder, qwen2, tmp_path / f"{folder.name}-run", prompts=["hi you"], max_tokens=2, options=options)
        for folder in (adapter, other)
    )
    for comparison, factor in zip(both_ways(one, two), (1.0, -1.0), strict=True):
        cause = comparison.causes[0]
        assert (only_code(comparison), {key[0] for key in cause.modules}) == ("LP625", fault.expected.modules)
        expected = fault.expected.factor
        assert cause.factor == (None if expected is None else pytest.approx(expected**factor, rel=2e-3))


def test_later_modules_differ_upstream_only(healthy: Trace, adapter: Path, llama: Path, tmp_path: Path) -> None:
    """One v_proj is off: what comes later has other inputs, and neither other weights nor other arithmetic."""
    fault = FILES["one percent of one B"]
    candidate = record_peft(edited(adapter, tmp_path / "edited", fault.tensors), llama, tmp_path / "run")
    comparison = compare(healthy, candidate)
    parts = {diff.module: diff.parts for diff in comparison.modules}
    off = parts.pop(ATTENTION.format(1, "v_proj"))
    assert off is not None
    assert off.weights == pytest.approx(0.01, rel=1e-3)
    assert (off.upstream, off.routing) == (0, 0)
    for module, part in parts.items():
        assert part is not None
        assert (part.weights, part.routing) == (0, 0)
        assert part.arithmetic is not None
        assert part.arithmetic < 2e-6
        assert part.upstream is not None
        assert (part.upstream > 1e-4) == ("layers.2" in module)
    own = comparison.largest_own
    assert own is not None
    assert own.module == ATTENTION.format(1, "v_proj")
    assert comparison.first is not None
    assert comparison.first.key[0] == own.module
    for diff in comparison.modules:
        assert diff.parts is not None
        assert diff.error == pytest.approx((diff.parts.weights or 0) + (diff.parts.upstream or 0), abs=1e-6)


def test_another_dtype_is_no_cause(healthy: Trace, adapter: Path, llama: Path, tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "lora_dtype": "bfloat16"}
    candidate = record_peft(adapter, llama, tmp_path / "run", options=options)
    for comparison in both_ways(healthy, candidate):
        assert (comparison.verdict, comparison.causes) == ("agree", ())


def test_a_base_of_its_own_for_each_run_is_the_same(healthy: Trace, adapter: Path, tmp_path: Path) -> None:
    """The same model in another folder."""
    candidate = record_peft(adapter, write_base(tmp_path / "again"), tmp_path / "run")
    for comparison in both_ways(healthy, candidate):
        assert (comparison.verdict, comparison.causes) == ("agree", ())


A1, B1 = (f"base_model.model.model.layers.1.self_attn.v_proj.lora_{half}.weight" for half in "AB")


def every(half: str, change: Any) -> Any:
    """An edit of all tensors of one half."""
    return lambda name, values: np.ascontiguousarray(change(values)) if f".lora_{half}." in name else values


def run_edited(adapter: Path, base: Path, folder: Path, *changes: Any, **config: Any) -> Trace:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        for edit in changes:
            tensors = {name: edit(name, values) for name, values in tensors.items()}
        return tensors

    other = edited(adapter, folder / "edited", change, lambda raw: raw | config)
    trace: Trace = record_peft(other, base, folder / "run")
    return trace


def test_the_same_product_in_another_way_is_no_difference(
    healthy: Trace, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    """Other A and B, with the same s·B·A and the same answers."""
    twice, half = every("A", lambda a: a * 2), every("B", lambda b: b / 2)
    wider = every("A", lambda a: np.pad(a, ((0, 8), (0, 0)))), every("B", lambda b: np.pad(b, ((0, 0), (0, 8))))
    negated = every("A", np.negative), every("B", np.negative)
    others = [
        run_edited(adapter, llama, tmp_path / "twice", twice, half),
        run_edited(adapter, llama, tmp_path / "alpha", half, lora_alpha=32),
        run_edited(adapter, llama, tmp_path / "wider", *wider, r=16, lora_alpha=32),
        run_edited(adapter, llama, tmp_path / "negated", *negated),
    ]
    for other in others:
        for comparison in both_ways(healthy, other):
            assert (comparison.verdict, comparison.causes) == ("agree", ())


def test_another_sign_of_a(healthy: Trace, adapter: Path, llama: Path, tmp_path: Path) -> None:
    """‖x·A·B‖ is the same, and the module is found all the same."""
    other = run_edited(adapter, llama, tmp_path, lambda name, values: -values if name == A1 else values)
    for comparison in both_ways(healthy, other):
        cause = comparison.causes[0]
        assert (cause.code, cause.factor) == ("LP625", pytest.approx(-1))
        assert comparison.first is not None
        assert comparison.first.key[0] == ATTENTION.format(1, "v_proj")


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_whole_modules_that_differ(module: str, llama: Path, tmp_path: Path) -> None:
    """They have no A and B; embeddings of the adapter are no other base."""
    adapter = write_adapter(tmp_path / "adapter", llama, modules_to_save=[module])
    one = record_peft(adapter, llama, tmp_path / "one")
    other = run_edited(adapter, llama, tmp_path, lambda name, values: values * 1.2 if module in name else values)
    for comparison in both_ways(one, other):
        assert only_code(comparison) == "LP625"
        assert module in comparison.causes[0].message
        assert all(cause.code != "LP627" for cause in comparison.causes)


@pytest.mark.parametrize("factor", [1e22, 1e30])
def test_numbers_beyond_float32(factor: float, healthy: Trace, adapter: Path, llama: Path, tmp_path: Path) -> None:
    other = run_edited(adapter, llama, tmp_path, lambda name, t: t * np.float32(factor) if name == B1 else t)
    for comparison in both_ways(healthy, other):
        assert only_code(comparison) in ("LP625", "LP605")


def test_an_answer_that_was_cut_is_no_other_answer(adapter: Path, llama: Path, tmp_path: Path) -> None:
    short, long = (record_peft(adapter, llama, tmp_path / str(n), prompts=["hi"], max_tokens=n) for n in (2, 5))
    for comparison in both_ways(short, long):
        assert (comparison.verdict, comparison.causes) == ("agree", ())


def test_tolerances_excuse_no_weights(healthy: Trace, adapter: Path, llama: Path, tmp_path: Path, capsys: Any) -> None:
    other = run_edited(adapter, llama, tmp_path, lambda name, values: -values if name == B1 else values)
    for options in (("--rtol", "3"), ("--atol", "1e9")):
        status, out, _ = call("compare", healthy.path, other.path, *options, capsys=capsys)
        assert status == 1
        assert "the traces differ: no module exceeds the tolerance" in out
        assert "s·B·A is -1 times that of the reference in 1 of 9 modules" in out
