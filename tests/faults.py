"""Faults of adapters and engines for `compare`: how each is injected, and which cause it must be given.

In: an adapter and its base. Out: `FILES`, faults in a checkpoint; `SLOTS`, faults in what vLLM has loaded; `KERNELS`,
faults in how it computes. Each with the rule, the modules and the factor that `compare` must name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import LAYERS, TARGETS

ATTENTION = "model.layers.{}.self_attn.{}"
EVERY = frozenset(ATTENTION.format(layer, target) for layer in range(LAYERS) for target in TARGETS)
K1, V1 = ATTENTION.format(1, "k_proj"), ATTENTION.format(1, "v_proj")
PREFIX = "base_model.model."

Tensors = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """The cause: its rule, its modules (None: it is not about modules), and the factor of the candidate, if it has one.
    `module` is the one with the largest error of its own, if only one has any."""

    code: str
    modules: frozenset[str] | None = None
    factor: float | None = None


@dataclass(frozen=True)
class FileFault:
    """A checkpoint that is edited: its tensors and its config."""

    expected: Expected
    tensors: Callable[[Tensors], Tensors] = dict
    config: Callable[[dict[str, Any]], dict[str, Any]] = dict


def _one(module: str, half: str, change: Callable[[Any], Any]) -> Callable[[Tensors], Tensors]:
    name = f"{PREFIX}{module}.lora_{half}.weight"
    return lambda tensors: tensors | {name: np.ascontiguousarray(change(tensors[name]))}


def _swapped(one: str, two: str) -> Callable[[Tensors], Tensors]:
    def swap(tensors: Tensors) -> Tensors:
        names = [(f"{PREFIX}{one}.lora_{half}.weight", f"{PREFIX}{two}.lora_{half}.weight") for half in "AB"]
        return tensors | {a: tensors[b] for a, b in names} | {b: tensors[a] for a, b in names}

    return swap


def _random(seed: int) -> Callable[[Any], Any]:
    return lambda values: np.random.default_rng(seed).normal(0, 0.05, values.shape).astype(np.float32)


def _without(layer: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: values for name, values in tensors.items() if f"layers.{layer}." not in name}


def _shorter(tensors: Tensors) -> Tensors:
    return {
        name: np.ascontiguousarray(values[:4] if "lora_A" in name else values[:, :4])
        for name, values in tensors.items()
    }


def _all_random(tensors: Tensors) -> Tensors:
    return {name: _random(number)(values) for number, (name, values) in enumerate(tensors.items())}


FILES: dict[str, FileFault] = {
    "one percent of one B": FileFault(
        Expected("LP625", frozenset({V1}), 1.01), _one(V1, "B", lambda b: b * np.float32(1.01))
    ),
    "another sign": FileFault(Expected("LP625", frozenset({V1}), -1.0), _one(V1, "B", lambda b: -b)),
    "A of one module": FileFault(Expected("LP625", frozenset({K1})), _one(K1, "A", _random(5))),
    "B of one module": FileFault(Expected("LP625", frozenset({K1})), _one(K1, "B", _random(6))),
    "k and v of one layer": FileFault(Expected("LP625", frozenset({K1, V1})), _swapped(K1, V1)),
    "two layers": FileFault(
        Expected("LP625", frozenset({V1, ATTENTION.format(2, "v_proj")})), _swapped(V1, ATTENTION.format(2, "v_proj"))
    ),
    "alpha": FileFault(Expected("LP625", EVERY, 2.0), config=lambda raw: raw | {"lora_alpha": 2 * raw["lora_alpha"]}),
    "rsLoRA": FileFault(Expected("LP625", EVERY, math.sqrt(8)), config=lambda raw: raw | {"use_rslora": True}),
    "alpha of one projection": FileFault(
        Expected("LP625", frozenset(ATTENTION.format(layer, "q_proj") for layer in range(LAYERS)), 4.0),
        config=lambda raw: raw | {"alpha_pattern": {"q_proj": 4 * raw["lora_alpha"]}},
    ),
    "another adapter": FileFault(Expected("LP625", EVERY), _all_random),
    "half the rank": FileFault(
        Expected("LP625", EVERY), _shorter, lambda raw: raw | {"r": 4, "lora_alpha": raw["lora_alpha"] // 2}
    ),
    "a layer is not in the file": FileFault(
        Expected("LP625", frozenset(ATTENTION.format(2, target) for target in TARGETS)),
        _without(2),
        lambda raw: raw | {"layers_to_transform": [0, 1]},
    ),
    "a zero B": FileFault(Expected("LP203", frozenset({V1})), _one(V1, "B", np.zeros_like)),
    "NaN in a B": FileFault(Expected("LP205", frozenset({V1})), _one(V1, "B", lambda b: b * np.float32("nan"))),
    "dead names": FileFault(
        Expected("LP501", EVERY), lambda tensors: {name.replace("layers", "blocks"): t for name, t in tensors.items()}
    ),
    "a layer of other names": FileFault(
        Expected("LP501", frozenset(ATTENTION.format(1, target) for target in TARGETS)),
        lambda tensors: {name.replace("layers.1.self_attn", "layers.1.attn"): t for name, t in tensors.items()},
    ),
    "a layer is missing": FileFault(
        Expected("LP204", frozenset(ATTENTION.format(2, target) for target in TARGETS)), _without(2)
    ),
}


Damage = Callable[[dict[int, Any], int], None]


@dataclass(frozen=True)
class SlotFault:
    """What is wrong in a slot of vLLM after it was filled: `damage` gets the fused layers by number, and the slot."""

    expected: Expected
    damage: Damage


SLICES = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def _times(factor: float, *modules: tuple[int, str]) -> Damage:
    def damage(layers: dict[int, Any], slot: int) -> None:
        for layer, target in modules:
            layers[layer].lora_b_stacked[SLICES[target]][slot] *= factor

    return damage


def _swap_slices(layers: dict[int, Any], slot: int) -> None:
    for stacked in (layers[1].lora_a_stacked, layers[1].lora_b_stacked):
        before = stacked[1][slot].clone()
        stacked[1][slot] = stacked[2][slot]
        stacked[2][slot] = before


def _shift_layers(layers: dict[int, Any], slot: int) -> None:
    for number in (0, 1):
        for here, there in (
            (layers[number].lora_a_stacked, layers[number + 1].lora_a_stacked),
            (layers[number].lora_b_stacked, layers[number + 1].lora_b_stacked),
        ):
            for one, two in zip(here, there, strict=True):
                one[slot] = two[slot]


def _overwrite(layers: dict[int, Any], slot: int) -> None:
    import torch

    held = layers[1].lora_b_stacked[2][slot]
    held.copy_(torch.randn(held.shape, generator=torch.Generator().manual_seed(3)) * 0.05)


def weights_of(folder: Path) -> dict[str, Any]:
    """A and s·B of an adapter, by module."""
    import torch

    from lora_probe.adapter import open_adapter

    opened = open_adapter(folder)
    return {
        pair.module: (torch.from_numpy(opened.values(pair.a)), torch.from_numpy(opened.values(pair.b)) * pair.scaling)
        for pair in opened.modules
        if pair.a is not None and pair.b is not None
    }


def of_another(weights: dict[str, Any]) -> Damage:
    """The slot holds the weights of another adapter."""

    def damage(layers: dict[int, Any], slot: int) -> None:
        for number, layer in layers.items():
            for target, place in SLICES.items():
                a, b = weights[ATTENTION.format(number, target)]
                layer.lora_a_stacked[place][slot, 0, : len(a)] = a
                layer.lora_b_stacked[place][slot, 0, :, : b.shape[1]] = b

    return damage


ALL = tuple((layer, target) for layer in range(LAYERS) for target in TARGETS)
SLOTS: dict[str, SlotFault] = {
    "a factor in one module": SlotFault(Expected("LP621", frozenset({V1}), 1.25), _times(1.25, (1, "v_proj"))),
    "one percent in one module": SlotFault(Expected("LP621", frozenset({V1}), 1.01), _times(1.01, (1, "v_proj"))),
    "another sign in one module": SlotFault(Expected("LP621", frozenset({K1}), -1.0), _times(-1.0, (1, "k_proj"))),
    "the scaling twice": SlotFault(Expected("LP621", EVERY, 2.0), _times(2.0, *ALL)),
    "the scaling not at all": SlotFault(Expected("LP621", EVERY, 0.5), _times(0.5, *ALL)),
    "an empty slot": SlotFault(Expected("LP505", frozenset({V1})), _times(0.0, (1, "v_proj"))),
    "k and v": SlotFault(Expected("LP623", frozenset({K1, V1})), _swap_slices),
    "layers off by one": SlotFault(
        Expected("LP623", frozenset(ATTENTION.format(layer, target) for layer in (0, 1) for target in TARGETS)),
        _shift_layers,
    ),
    "other numbers": SlotFault(Expected("LP622", frozenset({V1})), _overwrite),
}


@contextmanager
def patched(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """A method of vLLM replaced by what `make` makes of it."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def damaged_slots(fault: SlotFault) -> AbstractContextManager[None]:
    """vLLM damages its slots as `fault` has it, once they are filled."""
    from vllm.lora.model_manager import LoRAModelManager

    def damaging(original: Any) -> Any:
        def activate(self: Any, lora_id: int) -> bool:
            new = lora_id not in self._active_adapters
            result: bool = original(self, lora_id)
            if new:
                layers = {number: self.modules[f"model.layers.{number}.self_attn.qkv_proj"] for number in range(LAYERS)}
                fault.damage(layers, self.lora_index_to_id.index(lora_id))
            return result

        return activate

    return patched(LoRAModelManager, "activate_adapter", damaging)


def scaling_squared() -> AbstractContextManager[None]:
    """vLLM multiplies B by the scaling twice while it loads an adapter."""
    from vllm.lora.lora_weights import LoRALayerWeights

    def twice(original: Any) -> Any:
        def optimize(self: Any) -> Any:
            self.scaling **= 2
            return original(self)

        return optimize

    return patched(LoRALayerWeights, "optimize", twice)


def louder_kernel(llm: Any, factor: float) -> AbstractContextManager[None]:
    """The kernel for B writes `factor` times what it should for the v_proj of layer 1."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    layers: list[Any] = []
    llm.apply_model(lambda model: layers.append(model.model.layers[1].self_attn.qkv_proj))
    held = layers[0].lora_b_stacked[2].data_ptr()

    def louder(original: Any) -> Any:
        def apply(self: Any, y: Any, x: Any, w_t_all: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, y, x * factor if w_t_all.data_ptr() == held else x, w_t_all, *args, **kwargs)

        return apply

    return patched(PunicaWrapperCPU, "_apply_expand", louder)


def rows_without_a_slot(every: int) -> AbstractContextManager[None]:
    """vLLM's table from tokens to slots names none for `every`-th row."""
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    def outdated(original: Any) -> Any:
        def update(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self._token_lora_indices[::every].fill_(-1)

        return update

    return patched(PunicaWrapperBase, "update_metadata", outdated)
