"""JSON of `cost`: memory in bytes, shares, flags. In: a `ServingCost`. Out: a plain dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.json.benchmarks import measurement_json

if TYPE_CHECKING:
    from lora_probe.checking.cost import AtFlags, ServingCost


def cost_json(result: ServingCost) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "adapter": str(result.path),
        "model": str(result.base.path),
        "vllm_version": result.vllm or None,
        "rank": result.rank,
        "dtype": result.dtype,
        "weights_bytes": result.weights,
        "fits": result.fits,
        "refused": result.refused or None,
        "flags": _at(result.given),
        "fitting": _at(result.fitting),
        "layers": [
            {"layer": layer.name, "shapes": [list(shape) for shape in layer.shapes]} for layer in result.every.layers
        ],
        "not_counted": list(result.every.unknown),
        "notes": list(result.notes),
        "measured": [measurement_json(measurement) for measurement in result.measurements],
    }


def _at(at: AtFlags) -> dict[str, Any]:
    flags = at.flags
    return {
        "max_lora_rank": flags.max_lora_rank,
        "max_loras": flags.max_loras,
        "lora_target_modules": None if flags.targets is None else list(flags.targets),
        "layers": len(at.slots.names),
        "slot_bytes": at.slot,
        "slots_bytes": at.slot * flags.max_loras,
        "arithmetic": at.arithmetic,
    }
