"""Whether PEFT's live layers hold the values of the file.

In: a LoRA layer of a live PEFT model, and the pair of the file that belongs there. Out: a `Finding` for `placed` (the
file's values are cast to the live dtype and compared with the live ones bit for bit), and the kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.blocks import on_diagonal
from lora_probe.adapter.pair_values import extra_of
from lora_probe.adapter.variants import DORA, EXTRAS, KASA, LORA_BIAS
from lora_probe.engines.held import relative_difference
from lora_probe.engines.peft.experts import differing
from lora_probe.ledger import OK, Finding
from lora_probe.names import Key, ranges
from lora_probe.recording import Floats
from lora_probe.rules.lp5_loading import no_lora_layer, placed_differs

ADAPTER = "default"
"""The name of the adapter inside PEFT. The folder's name could clash with a method of torch's modules (`train`)."""


EXTRA_VALUES: Mapping[str, Callable[[Any], Any]] = {
    DORA.field: lambda layer: _part(layer, "lora_magnitude_vector", "weight"),
    KASA.field: lambda layer: _part(layer, "lora_diag"),
    LORA_BIAS.field: lambda layer: _part(layer, "lora_B", "bias"),
}
"""By the field of the config that asks for a third tensor: where a live layer has it."""

FORMULAS = frozenset(("", "Dora", "ALora", "BdLora", "Kasa", "MiCA", "Monteclora", "Velora"))
"""PEFT's words for the variants whose contribution is known; the empty one is plain LoRA."""


def _part(layer: Any, name: str, of: str | None = None) -> Any:
    """The live tensor of the adapter in one of a layer's tables, or the one called `of` in it; None if it has none."""
    part = dict(getattr(layer, name, {}).items()).get(ADAPTER)
    return part if part is None or of is None else getattr(part, of)


def layer_of(layers: Mapping[str, Any], key: Key, pair: AdapterModule) -> Any:
    """The live layer of a module, or the wrapper of a parameter; None if PEFT has none.

    PEFT nests the wrappers of several parameters of a module, and the names in the file say which of them is meant.
    """
    return layers.get(key[0] if key[1] == "weight" else pair.stored_as)


def slot_values(layer: Any, embedding: bool = False) -> tuple[Any, Any]:
    """The live A and B as torch tensors."""
    if embedding:
        return layer.lora_embedding_A[ADAPTER].detach(), layer.lora_embedding_B[ADAPTER].detach()
    return layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()


def multiplied(layer: Any, pair: AdapterModule) -> tuple[Floats, Floats]:
    """The live A `[r, in]` and B `[out, r]`, with all of BD-LoRA's zeros."""
    halves = zip(slot_values(layer, pair.embedding), pair.blocks, strict=True)
    a, b = (on_diagonal(half.float().cpu().numpy(), blocks) for half, blocks in halves)
    return a, b


def judge(adapter: Adapter, pair: AdapterModule, layer: Any, moment: str) -> Finding:
    """`placed`: the live A, B and scaling compared with the file."""
    import torch

    if layer is None:
        return no_lora_layer("PEFT", "the config does not target this parameter")
    if pair.a is None or pair.b is None:
        return placed_differs("the missing half", float("inf"), moment)
    held = slot_values(layer, pair.embedding)
    for half, tensor, weight in (("lora_A", pair.a, held[0]), ("lora_B", pair.b, held[1])):
        expected = torch.from_numpy(adapter.values(tensor)).to(weight.dtype)
        if (difference := relative_difference(weight.cpu(), expected)) is not None:
            experts = getattr(layer, "num_experts", 1) if weight.shape == expected.shape else 1
            numbers = differing(weight.cpu(), expected, experts, half) if experts > 1 else []
            of_experts = f" of experts {ranges(numbers)}" if numbers else ""
            return placed_differs(half + of_experts, difference, moment)
    for field, live in EXTRA_VALUES.items():
        if (extra := extra_of(pair, field)) is None or (weight := live(layer)) is None:
            continue
        expected = torch.from_numpy(adapter.values(extra).reshape(-1)).to(weight.dtype)
        if (difference := relative_difference(weight.detach().cpu().reshape(-1), expected)) is not None:
            return placed_differs(f"the {EXTRAS[field].word}", difference, moment)
    if layer.scaling[ADAPTER] != pair.scaling:
        error = abs(layer.scaling[ADAPTER] / pair.scaling - 1) if pair.scaling else float("inf")
        return placed_differs("the scaling", error, moment)
    return OK


def recordable(layer: Any) -> bool:
    """Whether the hooks support a layer: PEFT's LoRA `Linear`s and embeddings."""
    from peft.tuners.lora import Embedding, Linear

    return isinstance(layer, Linear | Embedding)


def is_dora(layer: Any) -> bool:
    """Whether a layer runs DoRA, whose contribution has a formula of its own."""
    return variant(layer) in ("DoraLinearVariant", "DoraEmbeddingVariant")


def has_formula(layer: Any) -> bool:
    """Whether it is known what a layer's variant of LoRA computes."""
    return (variant(layer) or "").removesuffix("LinearVariant").removesuffix("EmbeddingVariant") in FORMULAS


def variant(layer: Any) -> str | None:
    """The variant of LoRA that a layer runs (DoRA and others); None for plain LoRA."""
    runs_as = layer.lora_variant.get(ADAPTER)
    return type(runs_as).__name__ if runs_as is not None else None
