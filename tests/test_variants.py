"""Each row of the tables of variants and initialisations contains what other code needs and uses. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_probe import check
from lora_probe.adapter import open_adapter
from lora_probe.adapter.variants import (
    ALWAYS,
    BY_FIELD,
    EXTRAS,
    INITIALISATIONS,
    UNKNOWN_INITIALISATION_REFUSED,
    VARIANTS,
    ExtraTensor,
    Initialisation,
    Variant,
    initialisation,
)
from lora_probe.merging.plan import refusals
from lora_probe.names import PREFIX
from lora_probe.rules.vllm_versions import TABLE

MODULE = "model.layers.0.self_attn.q_proj"
VERSIONS = [row.version for row in TABLE]
VALUES: dict[str, Any] = {
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 4},
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "target_parameters": ["gate.weight"],
    "layers_to_transform": [0],
    "exclude_modules": ["v_proj"],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"n": 2},
    "velora_config": {"n": 2},
    "use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 1},
}
"""A value that switches a field on; `true` for the others."""

# An adapter that a variant is added to.


def adapter_with(folder: Path, extra: str | None = None, **config: Any) -> Path:
    """One pair, with numpy alone."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rank = 4 if config.get("rank_pattern") else 8
    tensors = {"lora_A.weight": rng.normal(size=(rank, 16)), "lora_B.weight": rng.normal(size=(16, rank))}
    if extra is not None:
        tensors[extra] = rng.normal(size=16)
    save_file(
        {f"{PREFIX}{MODULE}.{name}": values.astype(np.float32) for name, values in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    raw = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


def messages(adapter: Path, code: str, version: str | None = None) -> list[str]:
    """What a rule reports, also where another rule is about the same cause."""
    return [diagnostic.message for diagnostic in check(adapter, vllm_version=version, select=[code]).diagnostics]


def by_version(adapter: Path, code: str) -> list[str]:
    """The versions of vLLM for which a rule reports something."""
    return [version for version in VERSIONS if messages(adapter, code, version)]


def split(first: str) -> tuple[list[str], list[str]]:
    """The versions older than `first`, and the others. Nothing changes where `first` is empty."""
    if not first:
        return [], []
    at = 0 if first == ALWAYS else VERSIONS.index(first)
    return VERSIONS[:at], VERSIONS[at:]


# variants


def test_no_field_and_no_title_stands_twice() -> None:
    assert len(BY_FIELD) == len({variant.title for variant in VARIANTS}) == len(VARIANTS)
    assert len({row.name for row in INITIALISATIONS}) == len(INITIALISATIONS)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.field)
def test_a_variant_is_judged_by_its_row(variant: Variant, tmp_path: Path) -> None:
    path = adapter_with(tmp_path / "a", **{variant.field: VALUES.get(variant.field, True)})
    adapter = open_adapter(path)
    assert adapter.config.variants == (variant.title,)
    assert [variant.title in why and variant.not_replayed in why for why in refusals(adapter)] == (
        [True] if variant.not_replayed else []
    )
    trained_only = variant.extra is not None and variant.extra.in_training
    assert bool(messages(path, "LP110", VERSIONS[-1])) == (variant.vllm_ignores and not trained_only)
    if variant.field == "modules_to_save":
        # Its names decide, not the field.
        return
    ignored, refused = by_version(path, "LP407"), by_version(path, "LP406")
    older, newer = split(variant.vllm_refuses or variant.vllm_applies)
    assert ignored == older
    assert refused == (newer if variant.vllm_refuses else [])
    if variant.vllm_refuses:
        assert messages(path, "LP406", VERSIONS[-1]) == [f"vLLM does not support {variant.described}"]


def ends_of(extra: ExtraTensor) -> tuple[str, ...]:
    if extra.in_parts:
        return (".expert_weights",)
    # Nothing is saved as .bias.weight.
    return ("",) if extra.name.endswith(".bias") else ("", ".weight")


@pytest.mark.parametrize(
    ("field", "end"),
    [(field, end) for field, extra in EXTRAS.items() for end in ends_of(extra)],
)
def test_a_third_tensor_belongs_to_its_module_and_to_its_flag(field: str, end: str, tmp_path: Path) -> None:
    extra = EXTRAS[field]
    value = VALUES.get(field, True)
    both = adapter_with(tmp_path / "both", f"{extra.name}{end}", **{field: value})
    adapter = open_adapter(both)
    assert [len(module.extras) for module in adapter.modules] == [1]
    assert adapter.others == ()
    assert not messages(both, "LP211")
    assert not messages(both, "LP220")
    (message,) = messages(adapter_with(tmp_path / "tensor", f"{extra.name}{end}"), "LP211")
    assert extra.plural in message
    missing = messages(adapter_with(tmp_path / "flag", **{field: value}), "LP220")
    assert [extra.word in message for message in missing] == ([] if extra.in_training else [True])


def test_an_unknown_variant_is_not_passed(tmp_path: Path) -> None:
    for field in ("use_nextlora", "next_config"):
        assert messages(adapter_with(tmp_path / field, **{field: True}), "LP110")


# initialisations


@pytest.mark.parametrize("row", INITIALISATIONS, ids=lambda row: row.name)
def test_an_initialisation_is_judged_by_its_row(row: Initialisation, tmp_path: Path) -> None:
    word = f"{row.name}_4" if row.spelling else row.name
    path = adapter_with(tmp_path / "a", init_lora_weights=word)
    adapter = open_adapter(path)
    assert initialisation(word) is initialisation(word.upper()) is row
    assert adapter.config.variants == (() if row.plain else (f"init {word}",))
    assert row.accepts(word) == row.loads
    assert bool(messages(path, "LP111")) != row.loads
    assert bool(messages(path, "LP109")) == (row.base in ("random", "in training"))
    assert bool(list(refusals(adapter))) == (row.base in ("random", "of data", "in training"))
    assert (by_version(path, "LP407"), by_version(path, "LP406")) == split(row.vllm_refuses)
    shouted = adapter_with(tmp_path / "b", init_lora_weights=word.upper())
    assert bool(messages(shouted, "LP111")) != (row.loads and row.any_case)


def test_a_word_that_is_no_initialisation(tmp_path: Path) -> None:
    path = adapter_with(tmp_path / "a", init_lora_weights="gausian")
    assert initialisation("gausian") is initialisation(True) is None
    assert messages(path, "LP111") == ["PEFT does not support init_lora_weights 'gausian'"]
    assert by_version(path, "LP406") == split(UNKNOWN_INITIALISATION_REFUSED)[1]


@pytest.mark.parametrize(
    ("word", "loads"),
    [
        ("pissa_niter_16", True),
        ("pissa_niter_", False),
        ("pissa_niter_x", False),
        ("pissa_other", False),
        ("PiSSA", False),
    ],
)
def test_words_that_begin_like_one(word: str, loads: bool) -> None:
    row = initialisation(word)
    assert row is not None
    assert row.changes_base
    assert any(row.accepts(word) for row in INITIALISATIONS) == loads


@pytest.mark.parametrize("row", INITIALISATIONS, ids=lambda row: row.name)
def test_the_settings_of_an_initialisation_are_no_variant(row: Initialisation, tmp_path: Path) -> None:
    if row.settings:
        assert not messages(adapter_with(tmp_path / "a", **{row.settings: {"n": 1}}), "LP110")
