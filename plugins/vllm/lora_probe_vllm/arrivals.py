"""An adapter as it arrives in vLLM: read from a folder, pushed as tensors, or as a finished `LoRAModel`.

In: a folder, or tensors with a config, or vLLM's own model of an adapter. Out: its `Adapter`, which plays the part of
the file in the ledger, and the `Arrival` that says under which id and name it came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lora_probe.adapter import Adapter, PushedTensors, pushed_adapter
from lora_probe_vllm.seams import HELPER_FIELDS


@dataclass(frozen=True)
class Arrival:
    """One adapter under one id of the engine. `inplace`: its request asks to replace what the engine has under that
    id. `engine_names`: its modules have the engine's names, not those of a checkpoint."""

    adapter_id: int
    name: str
    adapter: Adapter
    inplace: bool = False
    engine_names: bool = False

    @property
    def path(self) -> str:
        return str(self.adapter.path)

    @cached_property
    def digest(self) -> str:
        return self.adapter.digest()

    @classmethod
    def of(cls, adapter_id: int, adapter: Adapter, request: Any, engine_names: bool = False) -> Arrival:
        """`request` is the LoRARequest that vLLM handles, None if a framework calls the LoRA manager directly."""
        if request is None or int(request.lora_int_id) != adapter_id:
            return cls(adapter_id, f"adapter {adapter_id}", adapter, engine_names=engine_names)
        inplace = bool(getattr(request, "load_inplace", False))
        return cls(adapter_id, str(request.lora_name), adapter, inplace, engine_names)


def fields_of(helper: Any, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of a config: those of the dictionary that vLLM's `PEFTHelper` was made from, if it is known, and those
    that vLLM goes by. The helper drops what vLLM does not use, such as `exclude_modules` and `layers_to_transform`."""
    used = {field: getattr(helper, field) for field in HELPER_FIELDS if hasattr(helper, field)}
    return {**(config or {}), **used}


def adapter_of_model(lora: Any, packed: Mapping[str, list[str]]) -> tuple[Adapter, PushedTensors]:
    """The adapter in a `LoRAModel` that was made without vLLM's loader. `packed` maps a fused layer to its parts.

    Nothing states which modules it should have: those that it has are expected.
    """
    pairs = dict(_pairs(lora, packed))
    tensors = PushedTensors(
        {f"{name}.lora_{half}.weight": tensor for name, pair in pairs.items() for half, tensor in pair.halves}
    )
    fields = {"r": lora.rank, "lora_alpha": lora.rank, "target_modules": sorted(pairs)}
    adapter = pushed_adapter(tensors, fields)
    modules = tuple(
        replace(module, scaling=pairs[module.module].scaling, config_rank=module.rank or lora.rank)
        for module in adapter.modules
    )
    return replace(adapter, modules=modules), tensors


@dataclass(frozen=True)
class _Pair:
    a: torch.Tensor | None
    b: torch.Tensor | None
    scaling: float

    @property
    def halves(self) -> list[tuple[str, torch.Tensor]]:
        return [(half, tensor) for half, tensor in (("A", self.a), ("B", self.b)) if tensor is not None]


def _pairs(lora: Any, packed: Mapping[str, list[str]]) -> Iterator[tuple[str, _Pair]]:
    """The pairs of a `LoRAModel` by the engine's names. Those of experts are stacked, and are left out."""
    for name, weights in lora.loras.items():
        if not isinstance(weights.lora_a, list):
            parts = [(name, _Pair(weights.lora_a, weights.lora_b, float(weights.scaling)))]
        else:
            names = packed.get(name, [])
            halves = zip(names, weights.lora_a, weights.lora_b, weights.scaling, strict=False)
            parts = [(part, _Pair(a, b, float(scaling or 1))) for part, a, b, scaling in halves]
        for part, pair in parts:
            if pair.halves and all(tensor.dim() == 2 for _, tensor in pair.halves):
                yield part, pair
