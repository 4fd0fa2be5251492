"""One cause is one finding: consequences are left out, and causes that have nothing to do with each other stay.

In: adapters with one damage or two. Out: the errors of `check`, by rule and engine.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from failures import FAILURES
from test_predictions import LIMIT, errors
from written import Tensors, edited, write_adapter, write_base

from lora_probe import check
from lora_probe.adapter import open_adapter
from lora_probe.checking import Report
from lora_probe.checking.check import fix_for
from lora_probe.checking.renaming import write


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        names = {name: name for name in tensors}
        for old, new in pairs:
            names = {name: changed.replace(old, new) for name, changed in names.items()}
        return {names[name]: tensor for name, tensor in tensors.items()}

    return edit


def report(folder: Path, base: Path, **options: Any) -> Report:
    return check(folder, model=str(base), options=LIMIT, **options)


# consequences


@pytest.mark.parametrize(
    ("name", "engines", "effect"),
    [
        ("B06-excluded", ("peft",), "these modules take effect in vLLM"),
        ("C06-no-prefix", ("peft",), "these modules take effect in vLLM"),
        ("A01-empty", ("peft", "vllm"), "the file holds no tensors"),
        ("D01-rank-above-limit", ("peft", "vllm"), "rank 8 in the tensors"),
        (
            "C14-unknown-word",
            ("peft", "vllm"),
            "`foo_proj` where the base model has `v_proj`",
        ),
        ("saved-without-weight-in-names", ("peft", "vllm"), "do not end in"),
        ("bias-null", ("peft", "vllm"), "`bias`"),
        ("B06-another", ("peft", "vllm"), "`o_proj` targeted, but not in the file; `k_proj` in the file"),
    ],
)
def test_a_cause_replaces_its_consequences(
    name: str, engines: tuple[str, ...], effect: str, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    (diagnostic,) = report(FAILURES[name].make(adapter, llama, tmp_path / "a"), llama).diagnostics
    assert diagnostic.engines == engines
    assert effect in diagnostic.message


def test_a_consequence_is_reported_if_its_cause_is_not_selected(adapter: Path, llama: Path, tmp_path: Path) -> None:
    folder = FAILURES["B06-excluded"].make(adapter, llama, tmp_path / "a")
    (differ,) = report(folder, llama, select=["LP410"]).diagnostics
    assert "3 of 9 modules take effect in vLLM alone" in differ.message
    whole = report(folder, llama)
    assert (errors(whole), whole.ignored) == ({"LP106"}, 0)
    without = report(folder, llama, ignore=["LP106"])
    assert (errors(without), without.ignored) == ({"LP410"}, 1)


def test_a_part_of_the_modules_takes_effect_in_the_other_engine(adapter: Path, llama: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        bad = "layers.2.self_attn.v_proj.lora_B"
        return {n.removeprefix("base_model.model."): t * float("nan") if bad in n else t for n, t in tensors.items()}

    diagnostics = report(edited(adapter, tmp_path / "a", edit), llama).diagnostics
    assert [(d.code, d.engines) for d in diagnostics] == [("LP205", ("vllm",)), ("LP215", ("peft",))]
    assert diagnostics[1].message.endswith("; 8 of these modules take effect in vLLM")


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        # A flag is not the cause of what another flag leads to.
        (None, {"task_type": "causal_lm", "init_lora_weights": "pissa"}, {"LP112", "LP406"}),
        (None, {"use_dora": True, "init_lora_weights": "pissa"}, {"LP220", "LP406"}),
        (None, {"use_dora": True, "init_lora_weights": "gausian"}, {"LP220", "LP111"}),
        # Modules that a cause does not name are not explained by it.
        (lambda ts: {n: t for n, t in ts.items() if "layers.1" not in n}, {"r": 16}, {"LP201", "LP204"}),
        (renamed(("layers.0.self_attn.v_proj", "layers.0.self_attn.foo_proj")), {}, {"LP325"}),
        (
            lambda ts: {n: t for n, t in renamed(("v_proj", "foo_proj"))(ts).items() if "layers.1" not in n},
            {},
            {"LP325", "LP204"},
        ),
        (None, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, {"LP106"}),
        # Two facts of three: either side may be right.
        (None, {"r": 16, "target_modules": ["q_proj", "v_proj"]}, {"LP113"}),
        (None, {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, {"LP113"}),
        (None, {"target_modules": ["q_proj", "v_proj", "o_proj"]}, {"LP113"}),
        # One fact alone, or one that is not true of all pairs.
        (None, {"rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "k_proj"]}, {"LP201"}),
        (None, {"r": 16, "layers_to_transform": [0, 1]}, {"LP201"}),
    ],
)
def test_causes_that_are_apart_stay_apart(
    tensors: Callable[[Tensors], Tensors] | None,
    config: dict[str, Any],
    expected: set[str],
    adapter: Path,
    llama: Path,
    tmp_path: Path,
) -> None:
    folder = edited(adapter, tmp_path / "a", tensors, lambda raw: raw | config)
    assert errors(report(folder, llama)) == expected


def test_a_rank_that_needs_a_larger_limit_is_not_explained_by_another_rank(
    adapter: Path, llama: Path, tmp_path: Path
) -> None:
    wide = write_adapter(tmp_path / "wide", llama, r=32, lora_alpha=32)

    def cut(tensors: Tensors) -> Tensors:
        def smaller(name: str, tensor: Any) -> Any:
            return tensor[:8] if "lora_A" in name else tensor[:, :8]

        return {n: smaller(n, t) if "layers.0.self_attn.q_proj" in n else t for n, t in tensors.items()}

    assert errors(report(edited(wide, tmp_path / "a", cut), llama)) == {"LP201", "LP402"}


# names

NAMES = {
    "word": ("self_attn", "attention"),
    "last-word": ("v_proj", "foo_proj"),
    "no-prefix": ("base_model.model.", ""),
    "two-prefixes": ("base_model.model.", "base_model.model.base_model.model."),
    "class": ("model.layers", "model.language_model.layers"),
    "wrapper": ("layers.", "_fsdp_wrapped_module.layers."),
    "second-layer": (".lora_", ".base_layer.lora_"),
    "adapter-name": ("lora_A.weight", "lora_A.mine.weight"),
    "no-ending": (".weight", ""),
}


@pytest.mark.parametrize(("first", "second"), itertools.combinations(NAMES, 2))
def test_two_damages_to_names_are_fixed_at_once(
    first: str, second: str, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    damaged = edited(adapter, tmp_path / "a", renamed(NAMES[first], NAMES[second]))
    for diagnostic in report(damaged, llama).diagnostics:
        assert "--fix -o FIXED/" in diagnostic.hint, diagnostic
    write(fix_for(damaged, str(llama)), tmp_path / "fixed")
    assert report(tmp_path / "fixed", llama).diagnostics == ()
    assert open_adapter(tmp_path / "fixed").weights.tensors.keys() == open_adapter(adapter).weights.tensors.keys()


@pytest.mark.parametrize(
    ("pairs", "config"),
    [
        # k_proj and v_proj have the same shape: which is which is not visible.
        ([("k_proj", "key"), ("v_proj", "value")], {}),
        # Two words for one.
        ([("layers.0.self_attn", "layers.0.attention"), ("layers.1.self_attn", "layers.1.attn")], {}),
        ([("self_attn.q", "attention.q"), ("self_attn.k", "attn.k"), ("self_attn.v", "attn.v")], {}),
        # A word that the base has is meant.
        ([("self_attn", "mlp")], {}),
        # Nothing targets the projection.
        ([("v_proj", "foo_proj")], {"target_modules": ["q_proj", "k_proj"]}),
        # A shape that does not fit.
        ([("v_proj", "value")], {"target_modules": ["q_proj", "k_proj", "o_proj"]}),
        # A layer that the base does not have.
        ([("self_attn", "attention"), ("layers.2", "layers.7")], {}),
    ],
)
def test_names_that_may_mean_several_modules_are_left_alone(
    pairs: list[tuple[str, str]], config: dict[str, Any], adapter: Path, llama: Path, tmp_path: Path
) -> None:
    damaged = edited(adapter, tmp_path / "a", renamed(*pairs), lambda raw: raw | config)
    assert "LP325" not in errors(report(damaged, llama))
    assert not fix_for(damaged, str(llama)).needed


def test_a_word_of_one_of_two_towers_is_left_alone(tmp_path: Path) -> None:
    """The part before the layers is another one too, so that the file may mean either tower."""
    base = write_base(tmp_path / "base", "paligemma")
    adapter = write_adapter(tmp_path / "a", base, target_modules=["q_proj", "k_proj", "v_proj"])

    def edit(tensors: Tensors) -> Tensors:
        tower = {name: tensor for name, tensor in tensors.items() if "vision_tower" in name}
        return {re.sub(r"model\.vision_tower.*?layers", "text.layers", n): t for n, t in attention(tower).items()}

    attention = renamed(("self_attn", "attention"))
    damaged = edited(adapter, tmp_path / "b", edit)
    assert open_adapter(damaged).modules
    assert not fix_for(damaged, str(base)).needed


def test_a_word_that_the_base_has_elsewhere_is_renamed(tmp_path: Path) -> None:
    """The head of this vision tower has an `attention`; its layers have a `self_attn`."""
    base = write_base(tmp_path / "base", "paligemma")
    adapter = write_adapter(tmp_path / "a", base, target_modules=["q_proj", "k_proj", "v_proj"])
    damaged = edited(adapter, tmp_path / "b", renamed(("encoder.layers.0.self_attn", "encoder.layers.0.attention")))
    renames = fix_for(damaged, str(base)).renamed
    assert len(renames) == 6
    assert all(new == old.replace("attention", "self_attn") for old, new in renames.items())


def test_a_layer_under_another_layer_is_not_a_wrapper_of_experts(tmp_path: Path) -> None:
    """Fused experts are stored under `base_layer`, whatever the config targets."""
    base = write_base(tmp_path / "base", "moe")
    adapter = write_adapter(tmp_path / "a", base)
    experts = edited(
        adapter,
        tmp_path / "b",
        lambda ts: (
            ts | {n.replace("self_attn.q_proj", "mlp.experts.base_layer"): t for n, t in ts.items() if "q_" in n}
        ),
    )
    assert "LP213" not in errors(check(experts, model=str(base)))
    assert not fix_for(experts, str(base)).needed


def test_a_fused_parameter_of_any_module_is_stored_under_base_layer(adapter: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        inner = {name.replace(".lora_", ".base_layer.lora_"): tensor for name, tensor in tensors.items()}
        return tensors | inner

    fused = {"target_parameters": ["q_proj.w1", "q_proj.w2", "k_proj.w1", "k_proj.w2", "v_proj.w1", "v_proj.w2"]}
    nameless = {"target_modules": None, "base_model_name_or_path": None}
    folder = edited(adapter, tmp_path / "a", edit, lambda raw: raw | fused | nameless)
    assert {pair.parameter for pair in open_adapter(folder).modules} == {"gate_up_proj", "down_proj"}
    assert errors(check(folder)) == set()
    assert not fix_for(folder).needed


# without a base


def test_the_config_of_another_adapter_is_seen_without_a_base(adapter: Path, tmp_path: Path) -> None:
    changed = {"base_model_name_or_path": None, "r": 16, "target_modules": ["q_proj", "v_proj"]}
    whole = check(edited(adapter, tmp_path / "a", config=lambda raw: raw | changed))
    assert errors(whole) == {"LP113"}
    # What a finding names is not known to be placed.
    assert {row.stations["placed"].value for row in whole.ledgers["vllm"].rows} == {"unknown"}


def test_targets_that_may_be_of_other_models_do_not_make_it_the_config_of_another(
    adapter: Path, tmp_path: Path
) -> None:
    """Without a base nobody knows which names of a list are modules."""
    changed = {"base_model_name_or_path": None, "target_modules": ["q_proj", "v_proj", "query", "value"]}
    assert errors(check(edited(adapter, tmp_path / "a", config=lambda raw: raw | changed))) == {"LP106"}
