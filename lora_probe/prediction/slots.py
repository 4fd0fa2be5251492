"""The memory that vLLM sets aside for adapters, and the work that they add.

In: vLLM's view of a base model, and its flags. Out: the layers that get slots. A slot of a layer has room for A and B
at `--max-lora-rank`, whatever rank the adapter in it has, and vLLM's kernels compute with all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_probe.base import EngineView, ModuleView
from lora_probe.prediction.vllm import passes


@dataclass(frozen=True)
class Layer:
    """A layer of the engine with LoRA. `shapes` has `(out, in)` of each projection that is fused in it; with `looks_up`
    it is an embedding, whose base does no arithmetic."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    looks_up: bool = False

    def values(self, rank: int) -> int:
        """The values of A and B of one slot."""
        return sum(rank * (out + width) for out, width in self.shapes)

    def products(self, rank: int) -> int:
        """The multiplications that LoRA adds for each token. An embedding's A is looked up, and its B makes a row."""
        return sum(rank * (width if self.looks_up else out + width) for out, width in self.shapes)

    def read(self, rank: int) -> int:
        """The values of one slot that a step of decoding reads: of an embedding's A, a row."""
        return sum(rank * ((0 if self.looks_up else out) + width) for out, width in self.shapes)

    @property
    def products_of_base(self) -> int:
        """The multiplications for each token without LoRA."""
        return 0 if self.looks_up else sum(out * width for out, width in self.shapes)


@dataclass(frozen=True)
class Slots:
    """The layers with slots, and those whose sizes are not known: they are not counted."""

    layers: tuple[Layer, ...]
    unknown: tuple[str, ...] = ()

    def values(self, rank: int) -> int:
        return sum(layer.values(rank) for layer in self.layers)

    def products(self, rank: int) -> int:
        return sum(layer.products(rank) for layer in self.layers)

    def read(self, rank: int) -> int:
        return sum(layer.read(rank) for layer in self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        return (*(layer.name for layer in self.layers), *self.unknown)

    @property
    def products_of_base(self) -> int:
        return sum(layer.products_of_base for layer in self.layers)


def slots(view: EngineView, targets: tuple[str, ...] | None = None) -> Slots:
    """The layers that vLLM wraps: all that it can adapt, or those that `--lora-target-modules` names."""
    shapes: dict[str, list[tuple[int, int]]] = {}
    kinds: dict[str, ModuleView] = {}
    unknown: dict[str, None] = {}
    for name, module in view.modules.items():
        if module.why_not or (targets is not None and not passes(name, module, targets)):
            continue
        layer = module.engine_as.partition("[")[0]
        if module.shape is None:
            unknown[layer] = None
        else:
            kinds[layer] = module
            shapes.setdefault(layer, []).append(module.shape)
    layers = (Layer(name, tuple(of), kinds[name].kind == "embedding") for name, of in shapes.items())
    return Slots(tuple(layer for layer in layers if layer.name not in unknown), tuple(unknown))
