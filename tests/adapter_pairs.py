"""Pairs of adapters with a known relation, for `inspect A B`: each made by editing one adapter, or by training it on.

In: an adapter as PEFT saves it. Out: by name, how the second one is made and what `inspect` has to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from written import Edit, Tensors

V1 = "model.layers.1.self_attn.v_proj"


def times(factor: float, only: str = "") -> Edit:
    def change(tensors: Tensors) -> Tensors:
        chosen = {name for name in tensors if "lora_B" in name and only in name}
        return {name: values * np.float32(factor) if name in chosen else values for name, values in tensors.items()}

    return change


def moved(tensors: Tensors, layers: tuple[str, ...] = ("layers.0.", "layers.2.")) -> Tensors:
    """A little more training in some layers."""
    numbers = np.random.default_rng(5)
    result = dict(tensors)
    for name, values in tensors.items():
        if any(layer in name for layer in layers):
            step = numbers.normal(0, 0.1 * float(np.std(values)), values.shape).astype(np.float32)
            result[name] = values + step
    return result


def swapped(tensors: Tensors) -> Tensors:
    exchange = {"layers.0.": "layers.2.", "layers.2.": "layers.0."}
    result = {}
    for name, values in tensors.items():
        other = next((old for old in exchange if old in name), None)
        result[name if other is None else name.replace(other, exchange[other])] = values
    return result


def transposed(tensors: Tensors) -> Tensors:
    """A and B of the square projections exchange their roles."""
    result = dict(tensors)
    for name in tensors:
        if "q_proj.lora_A" in name:
            partner = name.replace("lora_A", "lora_B")
            result[name], result[partner] = tensors[partner].T.copy(), tensors[name].T.copy()
    return result


def higher_rank(tensors: Tensors) -> Tensors:
    """Twice the rank with the same product: each row of A twice, each half of B once."""
    result = {}
    for name, values in tensors.items():
        if "lora_A" in name:
            result[name] = np.concatenate([values, values])
        else:
            # The scaling of the higher rank is half as large.
            result[name] = np.concatenate([values * np.float32(0.5), values * np.float32(1.5)], axis=1)
    return result


@dataclass(frozen=True)
class PairCase:
    """How the second adapter is made of the first one, and the beginning of the sentence about both."""

    says: str
    tensors: Edit = lambda tensors: tensors
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: raw
    same: bool = False


CASES = {
    "itself": PairCase("the same adapter: A, B and the scaling are equal in all 9 modules", same=True),
    "scaling": PairCase(
        "the same weights in all 9 modules, at 4 times the scaling in the second (lora_alpha 64 instead of 16)",
        config=lambda raw: raw | {"lora_alpha": 4 * raw["lora_alpha"]},
    ),
    "rsLoRA flag": PairCase(
        "the same weights in all 9 modules, at 2.828 times the scaling in the second (use_rslora true instead of",
        config=lambda raw: raw | {"use_rslora": True},
    ),
    "one module": PairCase("1 of 9 modules differs: layer 1 v_proj at 1.05 times ΔW of the first", times(1.05, V1)),
    "continued training": PairCase(
        "6 of 9 modules differ: layers 0, 2 q_proj, k_proj, v_proj moved by ",
        moved,
    ),
    "other rank with the same product": PairCase(
        "the same ΔW in all 9 modules, at rank 16 instead of 8",
        higher_rank,
        lambda raw: raw | {"r": 2 * raw["r"]},
        same=True,
    ),
    "swapped layers": PairCase(
        "6 of 9 modules differ: layers 0, 2 q_proj, k_proj, v_proj with A and B of other modules (layer 0 q_proj has",
        swapped,
    ),
    "sign": PairCase("the same weights in all 9 modules, with the other sign", times(-1)),
    "transposed roles": PairCase(
        "3 of 9 modules differ: layers 0-2 q_proj with A and B exchanged (ΔW is transposed)", transposed
    ),
    "another base": PairCase(
        "the same adapter: A, B and the scaling are equal in all 9 modules; the configs name different base models",
        config=lambda raw: raw | {"base_model_name_or_path": "org/other"},
        same=True,
    ),
}
