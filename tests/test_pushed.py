"""Adapters without files: their digest, their fields, and what is kept of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import numpy as np
import pytest
import torch

from lora_probe.adapter import PushedTensors, pushed, pushed_adapter
from lora_probe.errors import UnreadableFile
from lora_probe.rules.stored import expect

pytestmark = pytest.mark.slow

MODULES = tuple(f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{module}.lora_{half}.weight": torch.randn(shape, generator=generator).to(dtype)
        for module in MODULES
        for half, shape in (("A", (4, 32)), ("B", (24, 4)))
    }


def digest(values: dict[str, torch.Tensor], **fields: Any) -> str:
    return pushed_adapter(PushedTensors(values), FIELDS | fields).digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_the_tensors(dtype: torch.dtype) -> None:
    values = tensors(dtype)
    adapter = pushed_adapter(PushedTensors(values), FIELDS)
    assert [module.module for module in adapter.modules] == list(MODULES)
    assert {module.scaling for module in adapter.modules} == {2.0}
    for module in adapter.modules:
        assert module.a is not None
        np.testing.assert_array_equal(adapter.values(module.a), values[module.a.name].float().numpy())


def test_the_digest_covers_names_values_dtypes_and_fields() -> None:
    values = tensors()
    one = next(iter(values))
    others = [
        digest(tensors(seed=1)),
        digest(tensors(torch.bfloat16)),
        digest({name.replace("layers.1", "layers.7"): tensor for name, tensor in values.items()}),
        digest(values | {one: values[one].reshape(32, 4)}),
        digest(values, lora_alpha=16),
    ]
    assert len({digest(values), *others}) == 6
    assert digest(dict(reversed(values.items()))) == digest(tensors())


class _Task(StrEnum):
    CAUSAL = "CAUSAL_LM"


def test_fields_may_be_python_objects() -> None:
    """verl and others pass `asdict` of PEFT's own config."""
    fields = FIELDS | {"target_modules": {"q_proj", "v_proj"}, "task_type": _Task.CAUSAL, "layers_to_transform": {1}}
    adapter = pushed_adapter(PushedTensors(tensors()), fields)
    assert adapter.config.target_modules == ("q_proj", "v_proj")
    assert adapter.config.trained_as.task == "CAUSAL_LM"
    assert adapter.config.targeted(MODULES) == [MODULES[1]]


def test_a_field_of_a_wrong_type_is_an_error_that_names_no_file() -> None:
    with pytest.raises(UnreadableFile, match="`pushed as tensors`: `r` is 'eight'"):
        pushed_adapter(PushedTensors(tensors()), FIELDS | {"r": "eight"})


def test_what_is_missing_is_missing_in_the_pushed_tensors() -> None:
    half = {name: tensor for name, tensor in tensors().items() if "layers.0" in name}
    adapter = pushed_adapter(PushedTensors(half), FIELDS)
    rows = expect(adapter, dict.fromkeys(MODULES, (24, 32)))
    assert {row.module: row.stored.message for row in rows} == {MODULES[0]: "", MODULES[1]: "not in the pushed tensors"}


@pytest.mark.parametrize(
    ("settle", "kept"),
    [
        (lambda values: values.settle(keep=True), True),
        (lambda values: values.settle(keep=False), False),
    ],
)
def test_later_changes_of_the_tensors_do_not_matter(settle: Callable[[PushedTensors], None], kept: bool) -> None:
    values = tensors()
    held = PushedTensors(values)
    adapter = pushed_adapter(held, FIELDS)
    before = {name: tensor.clone() for name, tensor in values.items()}
    settle(held)
    for tensor in values.values():
        tensor.zero_()
    for name, header in adapter.weights.tensors.items():
        if kept:
            np.testing.assert_array_equal(adapter.values(header), before[name].numpy())
        else:
            with pytest.raises(UnreadableFile, match="no copy of the pushed tensors was kept"):
                adapter.values(header)


def test_a_copy_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    held = PushedTensors(tensors())
    adapter = pushed_adapter(held, FIELDS)
    monkeypatch.setattr(pushed, "MOST_COPIED", held.size - 1)
    held.settle(keep=True)
    with pytest.raises(UnreadableFile, match="the limit for a copy is"):
        adapter.values(next(iter(adapter.weights.tensors.values())))


def test_tensors_that_are_not_plain_are_refused() -> None:
    with pytest.raises(UnreadableFile, match="is sparse"):
        PushedTensors({"a.lora_A.weight": torch.eye(4).to_sparse()})
