"""What `inspect --module` shows of one module: for a person, and for a program.

In: a `OneModule` module. Out: renderables, or the entry of the module in `inspect --format json` with its values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from lora_probe.adapter.one_module import OneModule, TensorValues, label
from lora_probe.files.weights import TensorHeader
from lora_probe.render.cells import add_row, columns_of, words
from lora_probe.render.json import inspect_json

_NUMBERS = 8
"""Singular values in a line."""


def module(found: OneModule) -> RenderableType:
    """One module: names, shapes, scaling, all singular values, a corner of every tensor."""
    one, config = found.module, found.adapter.config
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    rank = f"{one.rank} in the tensors, {one.config_rank} in the config" if one.rank != one.config_rank else one.rank
    how = "alpha / sqrt(r)" if config.rslora else "alpha / r"
    for name, value in (
        ("adapter", str(found.adapter.path)),
        ("module", label(one)),
        ("rank", str(rank)),
        ("scaling", f"{one.scaling:g} ({how}, from the config)"),
        ("‖ΔW‖", _effect(found)),
    ):
        add_row(facts, name, value)
    table = columns_of("tensor", "shape", "dtype", "norm")
    for values in found.tensors:
        add_row(table, values.tensor.name, _shape(values.tensor), values.tensor.dtype, _norm(values))
    return Group(
        *(words(f"note: {note}", style="cyan") for note in found.adapter.notes),
        facts,
        words(""),
        table,
        *_missing(found),
        *_singular(found),
        *(part for values in found.tensors for part in _corner(values)),
    )


def _effect(found: OneModule) -> str:
    spectrum = found.spectrum
    if spectrum is None:
        return "none: A and B are no pair"
    if not spectrum.finite:
        return "not finite: A or B holds NaN or infinity"
    return f"{spectrum.norm:.6g}, effective rank {spectrum.effective_rank:.2f} of {found.module.rank}"


def _shape(tensor: TensorHeader) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _norm(values: TensorValues) -> str:
    return "not read" if values.norm is None else f"{values.norm:.6g}"


def _missing(found: OneModule) -> Iterable[RenderableType]:
    for half, tensor in (("lora_A", found.module.a), ("lora_B", found.module.b)):
        if tensor is None:
            yield words(f"{half} is missing in the file", style="bold yellow")


def _singular(found: OneModule) -> Iterable[RenderableType]:
    if found.spectrum is None or not found.spectrum.finite:
        return
    values = [f"{value:.4g}" for value in found.spectrum.singular]
    yield words("")
    yield words(f"singular values of s·B·A, all {len(values)}", style="bold")
    for at in range(0, len(values), _NUMBERS):
        yield words("  " + "  ".join(f"{value:>10}" for value in values[at : at + _NUMBERS]))


def _corner(values: TensorValues) -> Iterable[RenderableType]:
    name = values.tensor.name
    yield words("")
    if values.corner is None:
        yield words(f"{name} is not shown: {values.why}", style="bold yellow")
        return
    rows, columns = values.corner.shape
    whole = values.tensor.parameters == values.corner.size
    yield words(f"{name}{'' if whole else f', its first {rows} × {columns} values'}", style="bold")
    for row in values.corner:
        yield words("  " + "  ".join(f"{value:>12.5g}" for value in row))


def module_json(found: OneModule) -> dict[str, Any]:
    """What `inspect --format json --norms` says, of this module alone, with the norm and a corner of each tensor as
    `values`; null is what is no finite number."""
    one = found.module
    data = inspect_json(found.adapter, {one.stored_as: found.spectrum})
    data["modules"] = [entry for entry in data["modules"] if entry["stored_as"] == one.stored_as]
    data["modules"][0] |= {"config_rank": one.config_rank, "values": [_values(values) for values in found.tensors]}
    return data


def _values(values: TensorValues) -> dict[str, Any]:
    corner = values.corner
    return {
        "tensor": values.tensor.name,
        "norm": _finite(values.norm),
        "corner": None if corner is None else [[_finite(value) for value in row] for row in corner.tolist()],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
