"""Finds modules in a vLLM model without LoRA layers.

In: the model, and paths of modules as in Transformers. Out: the layer of each, and which part of its output belongs to
the module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lora_probe_vllm.seams import output_widths, packed_modules, rename_mapper
from lora_probe_vllm.slots import renamed


@dataclass(frozen=True)
class Part:
    """Slice `slice` of the output of `layer`; `widths` are those of all its slices."""

    layer: Any
    slice: int
    widths: list[int]


def locate(model: Any, names: Iterable[str]) -> dict[str, Part]:
    """The linear layers of `names`. Names that this model does not have, or has as another kind of layer, are left
    out."""
    packed = packed_modules(model)
    parts: dict[str, Part] = {}
    for path, layer in model.named_modules():
        widths = output_widths(layer)
        if widths is None:
            continue
        parent, _, last = path.rpartition(".")
        members = packed.get(last, [last])
        if len(members) == len(widths):
            for index, member in enumerate(members):
                parts[f"{parent}.{member}" if parent else member] = Part(layer, index, widths)
    return {name: parts[path] for name, path in renamed(names, set(parts), rename_mapper(model)).items()}
