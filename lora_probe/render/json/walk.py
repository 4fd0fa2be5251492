"""JSON of `show --module`. In: the `Walk` of each trace. Out: a plain dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_probe.comparison.walk import Walk
from lora_probe.precision import finite
from lora_probe.render.json import SCHEMA_VERSION


def walks_json(every: Sequence[Walk]) -> dict[str, Any]:
    """One entry for each trace; numbers that were not recorded are null."""
    return {"schema_version": SCHEMA_VERSION, "walks": [_walk_json(walk) for walk in every]}


def _walk_json(walk: Walk) -> dict[str, Any]:
    module, parameter, expert = walk.key
    return {
        "trace": walk.trace,
        "engine": walk.engine,
        "dtype": walk.dtype,
        "adapter": walk.load.name,
        "load": walk.load.load,
        "module": module,
        "parameter": parameter,
        "expert": expert,
        "engine_as": walk.engine_as,
        "request": walk.request,
        "position": walk.position,
        "token": walk.token,
        "phase": "decode" if walk.decoded else "prefill",
        "rank": walk.rank,
        "scaling": walk.scaling,
        "x_norm": walk.x_norm,
        "x_width": walk.width,
        "shrink": None if walk.shrink is None else [finite(value) for value in walk.shrink],
        "delta_norm": walk.delta_norm,
        "base_norm": walk.base_norm,
        "strength": walk.strength,
        "output_norm": walk.output_norm,
        "first_values": {name: [finite(value) for value in values] for name, values in walk.first.items()},
    }
