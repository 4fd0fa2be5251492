"""Every rule on merges, with merges computed by numpy: the base's weights plus s·B·A, and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, TARGETS
from safetensors.numpy import load_file, save_file
from test_trace_format import write as write_trace
from written import Tensors, edited, write_adapter, write_base

from lora_probe import open_trace
from lora_probe.comparison.effect import Effect
from lora_probe.comparison.outputs import FirstModule, ModuleOutput
from lora_probe.merging.parity import Parity, _judged, later_in_outputs
from lora_probe.merging.report import MergeReport
from lora_probe.merging.weights import check_merge

Q = "model.layers.{}.self_attn.q_proj"
O_PROJ = "model.layers.{}.self_attn.o_proj"
ALL = [f"model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in TARGETS]
DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


def merged(folder: Path, base: Path, adapter: Path, edit: Callable[[Tensors], Tensors] = dict, **config: Any) -> Path:
    """The base plus the adapter, then `edit`."""
    shutil.copytree(base, folder)
    tensors = load_file(base / "model.safetensors")
    for name, delta in deltas(adapter).items():
        stored = tensors[f"{name}.weight"]
        tensors[f"{name}.weight"] = (stored.astype(np.float32) + delta).astype(stored.dtype)
    return stored_as(folder, edit(tensors), **config)


def stored_as(folder: Path, tensors: Tensors, **config: Any) -> Path:
    save_file({name: np.array(t, order="C") for name, t in tensors.items()}, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


def deltas(adapter: Path) -> Tensors:
    """s·B·A of every module, for the scaling 2."""
    pairs = load_file(adapter / "adapter_model.safetensors")
    stems = [name.removesuffix(".lora_A.weight") for name in pairs if name.endswith(".lora_A.weight")]
    found = {stem: pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"] * np.float32(2) for stem in stems}
    return {stem.removeprefix("base_model.model."): delta for stem, delta in found.items()}


def codes(report: MergeReport) -> dict[str, tuple[str, ...]]:
    return {diagnostic.code: diagnostic.modules for diagnostic in report.diagnostics}


@pytest.fixture
def judged(llama: Path, adapter: Path, tmp_path: Path) -> Callable[..., MergeReport]:
    """The verdict on the healthy adapter's merge after some damage to it."""

    def judge(edit: Callable[[Tensors], Tensors] = dict, **config: Any) -> MergeReport:
        return check_merge(adapter, merged(tmp_path / "merged", llama, adapter, edit, **config), model=str(llama))

    return judge


def test_a_right_merge_is_verified(judged: Callable[..., MergeReport]) -> None:
    report = judged()
    assert report.verdict == "verified"
    assert not report.diagnostics


def rescaled(factor: float) -> Callable[[Tensors, Tensors, Tensors], Tensors]:
    """`factor` of every change; the right one is there already."""
    return lambda t, base, delta: {f"{n}.weight": t[f"{n}.weight"] + np.float32(factor - 1) * delta[n] for n in delta}


DAMAGES: dict[str, tuple[dict[str, tuple[str, ...]], Callable[[Tensors, Tensors, Tensors], Tensors]]] = {
    "the base": ({"LP701": tuple(ALL)}, lambda t, base, delta: base),
    "twice": ({"LP702": tuple(ALL)}, rescaled(2)),
    "half": ({"LP703": tuple(ALL)}, rescaled(0.5)),
    "subtracted": ({"LP704": tuple(ALL)}, rescaled(-1)),
    "swapped": (
        {"LP705": (Q.format(0), Q.format(2))},
        lambda t, base, delta: {
            f"{Q.format(n)}.weight": base[f"{Q.format(n)}.weight"] + delta[Q.format(2 - n)] for n in (0, 2)
        },
    ),
    "one value": (
        {"LP706": (Q.format(1),)},
        lambda t, base, delta: {f"{Q.format(1)}.weight": t[f"{Q.format(1)}.weight"] + np.eye(128, dtype=np.float32)},
    ),
    "an untouched tensor": ({"LP708": (DOWN,)}, lambda t, base, delta: {DOWN: t[DOWN] * np.float32(1.01)}),
    "one tensor more": ({"LP710": ("lora_A.extra",)}, lambda t, base, delta: {"lora_A.extra": t[DOWN]}),
    "not finite": (
        {"LP711": (Q.format(0),)},
        lambda t, base, delta: {f"{Q.format(0)}.weight": t[f"{Q.format(0)}.weight"] * np.float32("nan")},
    ),
    "another base": (
        {"LP714": ()},
        lambda t, base, delta: {
            name: tensor + np.random.default_rng(5).normal(0, 0.02, tensor.shape).astype(np.float32)
            for name, tensor in t.items()
        },
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(name: str, judged: Callable[..., MergeReport], llama: Path, adapter: Path) -> None:
    expected, damage = DAMAGES[name]
    base, delta = load_file(llama / "model.safetensors"), deltas(adapter)
    report = judged(lambda tensors: tensors | damage(tensors, base, delta))
    assert report.verdict == "differs"
    assert codes(report) == expected


def test_a_tensor_that_is_missing(judged: Callable[..., MergeReport]) -> None:
    report = judged(lambda tensors: {name: tensor for name, tensor in tensors.items() if name != DOWN})
    assert codes(report) == {"LP709": (DOWN,)}


def test_a_transposed_change(llama: Path, tmp_path: Path) -> None:
    """Only where as many values go in as come out does nothing complain."""
    adapter = write_adapter(tmp_path / "a", llama, target_modules=["o_proj"])
    delta = deltas(adapter)

    def turned(tensors: Tensors) -> Tensors:
        return tensors | {f"{n}.weight": tensors[f"{n}.weight"] - delta[n] + delta[n].T for n in delta}

    report = check_merge(adapter, merged(tmp_path / "m", llama, adapter, turned), model=str(llama))
    assert codes(report) == {"LP720": tuple(O_PROJ.format(layer) for layer in range(LAYERS))}


def test_rounding_that_swallows_the_change(llama: Path, tmp_path: Path) -> None:
    """A change of a tenth of float16's steps."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(llama / "model.safetensors").items()}
    stored_as(base, halves, dtype="float16")
    weak = write_adapter(tmp_path / "a", base, trained=5e-7)
    report = check_merge(weak, merged(tmp_path / "m", base, weak), model=str(base))
    assert codes(report) == {"LP707": tuple(ALL)}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return write_base(tmp_path / "tied", "tied")


def test_an_adapter_on_one_of_two_tied_places_changes_both(tied: Path, tmp_path: Path) -> None:
    adapter = edited(
        write_adapter(tmp_path / "a", tied, target_modules=["q_proj", "embed_tokens"]),
        tmp_path / "b",
        # What PEFT saves along is the embedding as it was.
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "base_layer" not in name},
    )
    pair = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    change = (pair[f"{stem}B"] @ pair[f"{stem}A"]).T * np.float32(2)
    place = "model.embed_tokens.weight"
    folder = merged(tmp_path / "m", tied, adapter, lambda tensors: tensors | {place: tensors[place] + change})
    report = check_merge(adapter, folder, model=str(tied))
    assert report.verdict == "verified"
    (warning,) = report.diagnostics
    assert (warning.code, warning.severity, warning.modules) == ("LP713", "warning", ("model.embed_tokens",))


def test_tied_places_that_differ(tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", tied, target_modules=["q_proj"])
    head = {"lm_head.weight": load_file(tied / "model.safetensors")["model.embed_tokens.weight"] + np.float32(1)}
    report = check_merge(adapter, merged(tmp_path / "m", tied, adapter, lambda t: t | head), model=str(tied))
    assert codes(report)["LP712"] == ("lm_head.weight",)


def test_a_saved_head_that_was_left_out(llama: Path, tmp_path: Path) -> None:
    head = "base_model.model.lm_head.weight"
    adapter = edited(
        write_adapter(tmp_path / "a", llama, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        tmp_path / "b",
        lambda tensors: tensors | {head: tensors[head] + np.float32(0.1)},
    )
    report = check_merge(adapter, merged(tmp_path / "m", llama, adapter), model=str(llama))
    assert codes(report) == {"LP719": ("lm_head",)}


def test_what_peft_cannot_merge_is_not_judged(llama: Path, adapter: Path, tmp_path: Path) -> None:
    corda = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"init_lora_weights": "corda"})
    report = check_merge(corda, merged(tmp_path / "m", llama, corda), model=str(llama))
    assert report.verdict == "undecided"
    assert set(codes(report)) == {"LP715"}


def test_the_part_that_an_initialisation_takes_out(llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", llama, target_modules=["q_proj"], init_lora_weights="olora")
    whole = check_merge(adapter, merged(tmp_path / "whole", llama, adapter), model=str(llama))
    assert codes(whole) == {"LP721": tuple(Q.format(layer) for layer in range(LAYERS))}


def test_a_merge_into_the_base_of_the_initialisation_says_so(llama: Path, tmp_path: Path) -> None:
    """OLoRA takes s·Q·R out of the base: the merge is what is left plus what was trained."""
    adapter = write_adapter(tmp_path / "a", llama, target_modules=["q_proj"], init_lora_weights="olora")

    base = Path(shutil.copytree(llama, tmp_path / "rest"))
    tensors = load_file(base / "model.safetensors")
    for layer in range(LAYERS):
        name = f"{Q.format(layer)}.weight"
        q, r = np.linalg.qr(tensors[name])
        tensors[name] = tensors[name] - np.float32(2) * (q[:, :8] @ r[:8])
    stored_as(base, tensors)
    report = check_merge(adapter, merged(tmp_path / "m", base, adapter), model=str(llama))
    assert report.verdict == "verified"
    assert codes(report) == {"LP718": tuple(Q.format(layer) for layer in range(LAYERS))}
    assert report.diagnostics[0].severity == "warning"


def test_dora_merged_as_plain_lora(llama: Path, tmp_path: Path) -> None:
    def longer(tensors: Tensors) -> Tensors:
        return {n: t * np.float32(1.1) if "magnitude" in n else t for n, t in tensors.items()}

    adapter = edited(
        write_adapter(tmp_path / "a", llama, target_modules=["q_proj"], use_dora=True), tmp_path / "b", longer
    )
    report = check_merge(adapter, merged(tmp_path / "m", llama, adapter), model=str(llama))
    assert codes(report) == {"LP722": tuple(Q.format(layer) for layer in range(LAYERS))}


@pytest.fixture
def effect(tmp_path: Path) -> Effect:
    """What two recordings show of a merge that keeps all of the effect."""
    write_trace(tmp_path / "trace")
    trace = open_trace(tmp_path / "trace")
    measures = {"tokens": 8, "kl_merged": 0.0, "kl_base": 1.0, "survives": 1.0, "top1": 1.0, "base_top1": 0.5}
    return Effect(
        **measures,
        logprob_error=0.0,
        unmerged=trace,
        merged=trace,
        dtype="float32",
        tolerance=1e-3,
        prompts=(),
        first_module=None,
        modules=(),
        notes=(),
    )


@pytest.mark.parametrize(("error", "state"), [(0.5e-3, "stays within the tolerance of float32"), (0.2, "exceeds it")])
def test_outputs_that_first_differ_at_a_later_module_are_explained(
    error: float, state: str, effect: Effect, judged: Callable[..., MergeReport]
) -> None:
    """The weights name layer 0, the outputs layer 1: both are printed, and why."""
    weights = judged()
    keys = [module.key for module in weights.modules]
    errors = tuple(ModuleOutput(key, error if number == 0 else 0.3) for number, key in enumerate(keys))
    first = FirstModule(keys[1], 0, 0, -1, 0.3)
    outputs = replace(effect, first_module=first, modules=errors)
    wrong = replace(weights, modules=(replace(weights.modules[0], status="differs"), *weights.modules[1:]))
    text = later_in_outputs(wrong, outputs)
    assert text.startswith("layer 0 self_attn.q_proj, the first module with wrong weights, ")
    assert state in text
    assert f"error {error:.1e}" in text
    assert later_in_outputs(weights, outputs) == ""
    assert later_in_outputs(wrong, replace(outputs, first_module=replace(first, key=keys[0]))) == ""
    assert later_in_outputs(wrong, effect) == ""


def test_what_survives_of_the_effect_decides(effect: Effect, judged: Callable[..., MergeReport]) -> None:
    weights = judged()
    cases = (
        (effect, [], "verified"),
        (replace(effect, survives=0.91, kl_merged=0.0081), [], "verified"),
        (replace(effect, survives=0.89, kl_merged=0.0121), ["LP716"], "differs"),
        (replace(effect, survives=float("nan"), kl_merged=float("inf")), ["LP716"], "differs"),
        (replace(effect, survives=0.5, kl_merged=1e-12, kl_base=4e-12), ["LP717"], "undecided"),
        (replace(effect, survives=None), ["LP717"], "undecided"),
    )
    for outputs, expected, verdict in cases:
        found = Parity(weights, outputs, "peft", None, (), tuple(_judged(outputs)))
        assert [diagnostic.code for diagnostic in found.diagnostics] == expected
        assert found.verdict == verdict


def test_a_recording_that_is_not_complete_is_not_passed(effect: Effect, tmp_path: Path) -> None:
    process = tmp_path / "trace" / "peft" / "process.json"
    process.write_text(json.dumps(json.loads(process.read_text()) | {"closed": False}))
    torn = open_trace(tmp_path / "trace")
    assert not torn.complete
    assert [finding.code for finding in _judged(replace(effect, merged=torn))] == ["LP717"]
