"""Whether PEFT's live layers hold the values of the file.

In: a LoRA layer of a live PEFT model, and the pair of the file that belongs there. Out: a `Finding` for `placed` (the
file's values are cast to the live dtype and compared with the live ones bit for bit), and the kind of layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.pair_values import extra_of, on_diagonal
from lora_probe.adapter.variants import DORA, EXTRAS, KASA, LORA_BIAS
from lora_probe.engines.held import relative_difference
from lora_probe.engines.peft.experts import differing
from lora_probe.ledger import OK, Finding
from lora_probe.names import Key, ranges
from lora_probe.recording import Floats
from lora_probe.rules.lp5_loading import no_lora_layer, placed_differs

ADAPTER = "default"
"""The name of the first adapter inside PEFT. A folder's name could clash with a method of torch's modules (`train`)."""

FORMULAS = frozenset(("", "Dora", "ALora", "BdLora", "Kasa", "MiCA", "Monteclora", "Velora"))
"""PEFT's words for the variants whose contribution is known; the empty one is plain LoRA."""


@dataclass(frozen=True)
class Slot:
    """What a live LoRA layer has for one adapter, which PEFT calls `adapter`."""

    layer: Any
    adapter: str = ADAPTER

    @property
    def looks_up(self) -> bool:
        """Whether the layer is an embedding."""
        return self.adapter in self.layer.lora_embedding_A

    @property
    def a(self) -> Any:
        """The module that multiplies x with A; an embedding has none."""
        return self.layer.lora_A[self.adapter]

    @property
    def b(self) -> Any:
        return self.layer.lora_B[self.adapter]

    @property
    def weights(self) -> tuple[Any, Any]:
        """A and B as torch tensors, as PEFT stores them."""
        if self.looks_up:
            a, b = self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]
            return a.detach(), b.detach()
        return self.a.weight.detach(), self.b.weight.detach()

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter])

    @property
    def magnitudes(self) -> Any:
        """DoRA's module; None without DoRA."""
        return self._in("lora_magnitude_vector")

    @property
    def diagonal(self) -> Any:
        """KaSA's diagonal; None without KaSA."""
        return self._in("lora_diag")

    @property
    def variant(self) -> Any:
        """PEFT's object for the variant of LoRA that the layer runs; None for plain LoRA."""
        return self.layer.lora_variant.get(self.adapter)

    @property
    def runs_as(self) -> str | None:
        """The name of its class."""
        return None if self.variant is None else type(self.variant).__name__

    @property
    def is_dora(self) -> bool:
        """Whether the layer runs DoRA, which needs the base weight."""
        return self.runs_as in ("DoraLinearVariant", "DoraEmbeddingVariant")

    @property
    def has_formula(self) -> bool:
        """Whether it is known what the layer's variant of LoRA computes."""
        return (self.runs_as or "").removesuffix("LinearVariant").removesuffix("EmbeddingVariant") in FORMULAS

    @property
    def recordable(self) -> bool:
        """Whether the hooks support the layer: PEFT's LoRA `Linear`s and embeddings."""
        from peft.tuners.lora import Embedding, Linear

        return isinstance(self.layer, Linear | Embedding)

    def third(self, field: str) -> Any:
        """The live tensor that the config's `field` asks for beside A and B; None if PEFT has none."""
        if field == DORA.field:
            return None if self.magnitudes is None else self.magnitudes.weight
        if field == LORA_BIAS.field:
            return getattr(self._in("lora_B"), "bias", None)
        return self.diagonal if field == KASA.field else None

    def _in(self, table: str) -> Any:
        return dict(getattr(self.layer, table, {}).items()).get(self.adapter)


def slots_in(model: Any, adapter: str = ADAPTER) -> dict[str, Slot]:
    """The slots of one adapter in a live PEFT model, by module."""
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    return {
        name: Slot(layer, adapter)
        for name, layer in layers.items()
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    }


def slot_of(slots: Mapping[str, Slot], key: Key, pair: AdapterModule) -> Slot | None:
    """The slot of a module, or of the wrapper of a parameter; None if PEFT has none.

    PEFT nests the wrappers of several parameters of a module, and the names in the file say which of them is meant.
    """
    return slots.get(key[0] if key[1] == "weight" else pair.stored_as)


def multiplied(slot: Slot, pair: AdapterModule) -> tuple[Floats, Floats]:
    """The live A `[r, in]` and B `[out, r]`, with all of BD-LoRA's zeros."""
    halves = zip(slot.weights, pair.blocks, strict=True)
    a, b = (on_diagonal(half.float().cpu().numpy(), blocks) for half, blocks in halves)
    return a, b


def judge(adapter: Adapter, pair: AdapterModule, slot: Slot | None, moment: str) -> Finding:
    """`placed`: the live A, B and scaling compared with the file."""
    import torch

    if slot is None:
        return no_lora_layer("PEFT", "the config does not target this parameter")
    if pair.a is None or pair.b is None:
        return placed_differs("the missing half", float("inf"), moment)
    for half, tensor, weight in zip(("lora_A", "lora_B"), (pair.a, pair.b), slot.weights, strict=True):
        expected = torch.from_numpy(adapter.values(tensor)).to(weight.dtype)
        if (difference := relative_difference(weight.cpu(), expected)) is not None:
            experts = getattr(slot.layer, "num_experts", 1) if weight.shape == expected.shape else 1
            numbers = differing(weight.cpu(), expected, experts, half) if experts > 1 else []
            of_experts = f" of experts {ranges(numbers)}" if numbers else ""
            return placed_differs(half + of_experts, difference, moment)
    for field in EXTRAS:
        if (extra := extra_of(pair, field)) is None or (weight := slot.third(field)) is None:
            continue
        expected = torch.from_numpy(adapter.values(extra).reshape(-1)).to(weight.dtype)
        if (difference := relative_difference(weight.detach().cpu().reshape(-1), expected)) is not None:
            return placed_differs(f"the {EXTRAS[field].word}", difference, moment)
    if slot.scaling != pair.scaling:
        error = abs(slot.scaling / pair.scaling - 1) if pair.scaling else float("inf")
        return placed_differs("the scaling", error, moment)
    return OK
