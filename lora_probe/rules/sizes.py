"""The size of a base model as people know it: its hidden size and its number of layers.

In: a base, or an adapter's pairs. Out: `Sizes`, None where they do not show it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_probe.base import Base

_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The keys of transformers' configs, by model type."""
_OTHERS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class Sizes:
    hidden: int | None
    layers: int | None


def sizes_of(base: Base) -> Sizes:
    """What the config of a base states."""
    return Sizes(_number(base.text, _HIDDEN), _number(base.text, _LAYERS))


def differing(first: Base, second: Base) -> tuple[str, int, int] | None:
    """A size that two configs state differently: its name in words, and both numbers."""
    for words, keys in (("hidden size", _HIDDEN), ("layers", _LAYERS), *((key, (key,)) for key in _OTHERS)):
        one, other = _number(first.text, keys), _number(second.text, keys)
        if one is not None and other is not None and one != other:
            return words, one, other
    return None


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((value for key in keys if type(value := config.get(key)) is int), None)
