"""Whether PEFT's live layers hold the values of the file.

In: a LoRA layer of a live PEFT model, and the pair of the file that belongs there. Out: a `Finding` for `placed` (the
file's values are cast to the live dtype and compared with the live ones bit for bit), and the kind of layer.
"""

from __future__ import annotations

from typing import Any

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.engines.held import relative_difference
from lora_probe.ledger import OK, Finding
from lora_probe.rules.lp5_loading import not_measured, placed_differs

ADAPTER = "default"
"""The name of the adapter inside PEFT. The folder's name could clash with a method of torch's modules (`train`)."""


def slot_values(layer: Any, embedding: bool = False) -> tuple[Any, Any]:
    """The live A and B as torch tensors."""
    if embedding:
        return layer.lora_embedding_A[ADAPTER].detach(), layer.lora_embedding_B[ADAPTER].detach()
    return layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()


def judge(adapter: Adapter, pair: AdapterModule, layer: Any, moment: str) -> Finding:
    """`placed`: the live A, B and scaling compared with the file."""
    import torch

    if pair.parameter != "weight":
        return not_measured("PEFT's wrappers of fused expert parameters are not read yet")
    if pair.a is None or pair.b is None:
        return placed_differs("the missing half", float("inf"), moment)
    held = slot_values(layer, pair.embedding)
    for half, tensor, weight in (("lora_A", pair.a, held[0]), ("lora_B", pair.b, held[1])):
        expected = torch.from_numpy(adapter.values(tensor)).to(weight.dtype)
        if (difference := relative_difference(weight.cpu(), expected)) is not None:
            return placed_differs(half, difference, moment)
    if layer.scaling[ADAPTER] != pair.scaling:
        error = abs(layer.scaling[ADAPTER] / pair.scaling - 1) if pair.scaling else float("inf")
        return placed_differs("the scaling", error, moment)
    return OK


def recordable(layer: Any) -> bool:
    """Whether the hooks support a layer: PEFT's LoRA `Linear`s. Activated LoRA passes only some rows to its layers, and
    hooks cannot tell which."""
    from peft.tuners.lora import Linear

    return isinstance(layer, Linear) and not (variant(layer) or "").startswith("ALora")


def variant(layer: Any) -> str | None:
    """The variant of LoRA that a layer runs (DoRA and others); None for plain LoRA."""
    runs_as = layer.lora_variant.get(ADAPTER)
    return type(runs_as).__name__ if runs_as is not None else None
