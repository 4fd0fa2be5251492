"""Rows: what every module did for every position of every request, in columns.

In: arrays of one step, or of many. Out: `Rows`, joined, widened to more modules, and found by request and position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.names import Key

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    """Rows of one step or of many, in columns. Every array has the row first and the module second.

    `request`, `position`, `phase` and `load` (-1: none) describe a row: `[rows]`. The norms are `[rows, modules]`,
    `shrink` is `[rows, modules, r]` (None below its level). NaN means that the row did not run there.
    `gram` (G of the placed s·B) is `[modules, r, r]`. `sketch` (scored runs) stands for the modules' whole outputs,
    `[rows, modules, 32]`. `tensors` holds x, base and delta at level `tensors`,
    each `[rows, width]` under `x/3`, `base/3`, `delta/3` for module 3.
    """

    modules: tuple[Key, ...]
    requests: tuple[str, ...]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]
    load: npt.NDArray[np.int32]
    x_norm: Floats
    base_norm: Floats
    delta_norm: Floats
    output_norm: Floats
    shrink: Floats | None = None
    sketch: Floats | None = None
    gram: Floats | None = None
    placed: tuple[str, ...] = ()
    tensors: dict[str, Floats] | None = None

    def __len__(self) -> int:
        return len(self.request)


COMMON = ("request", "position", "phase", "load", "x_norm", "base_norm", "delta_norm", "output_norm")
ROW_COLUMNS = (*COMMON, "shrink", "sketch")


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows of the same modules as one. The table of requests is joined, later `gram` wins."""
    requests: dict[str, int] = {}
    numbers = []
    for part in parts:
        for request in part.requests:
            requests.setdefault(request, len(requests))
        table = np.array([requests[name] for name in part.requests], dtype=np.int32)
        numbers.append(table[part.request] if len(part.requests) else part.request)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ROW_COLUMNS[1:]
        if getattr(parts[0], name) is not None
    }
    last = parts[-1]
    return Rows(
        last.modules,
        tuple(requests),
        np.concatenate(numbers),
        gram=last.gram,
        placed=last.placed,
        tensors=_joined_tensors(parts),
        **columns,
    )


def output_rows(modules: tuple[Key, ...], request: str, phases: Sequence[int], norm: Floats, sketch: Floats) -> Rows:
    """The first rows of a request of a model without LoRA layers: only what its modules gave, `norm: [rows, modules]`
    and `sketch: [rows, modules, 32]`."""
    count = len(phases)
    nothing = np.full_like(norm, np.nan)
    return Rows(
        modules=modules,
        requests=(request,),
        request=np.zeros(count, np.int32),
        position=np.arange(count, dtype=np.int32),
        phase=np.array(phases, np.int8),
        load=np.full(count, -1, np.int32),
        x_norm=nothing,
        base_norm=nothing,
        delta_norm=nothing,
        output_norm=norm,
        sketch=sketch,
    )


def places(rows: Rows) -> dict[tuple[str, int], int]:
    """Row numbers by request and position; of a row that was computed twice the last wins."""
    names = [rows.requests[number] for number in rows.request]
    return {at: number for number, at in enumerate(zip(names, rows.position.tolist(), strict=True))}


def _joined_tensors(parts: Sequence[Rows]) -> dict[str, Floats] | None:
    """x, base and delta of all parts; NaN in the rows of a part in which the module did not run."""
    widths = {name: values.shape[1] for part in parts for name, values in (part.tensors or {}).items()}
    if not widths:
        return None
    return {
        name: np.concatenate(
            [(part.tensors or {}).get(name, np.full((len(part), width), np.nan, np.float32)) for part in parts]
        )
        for name, width in widths.items()
    }


def widened(rows: Rows, keys: tuple[Key, ...]) -> Rows:
    """The same rows with columns for `keys`; modules that did not run are NaN."""
    if rows.modules == keys:
        return rows
    numbers = {key: number for number, key in enumerate(keys)}
    where = np.array([numbers[key] for key in rows.modules], dtype=np.intp)

    def spread(column: Any, axis: int) -> Any:
        if column is None:
            return None
        shape = list(column.shape)
        shape[axis] = len(keys)
        wide = np.full(shape, np.nan, dtype=np.float32)
        wide[(slice(None),) * axis + (where,)] = column
        return wide

    placed = [""] * len(keys)
    for index, digest in zip(where, rows.placed, strict=False):
        placed[index] = digest
    tensors = None
    if rows.tensors is not None:
        parts = [(*name.partition("/"), values) for name, values in rows.tensors.items()]
        tensors = {f"{what}/{where[int(number)]}": values for what, _, number, values in parts}
    return replace(
        rows,
        modules=keys,
        gram=spread(rows.gram, 0),
        placed=tuple(placed),
        tensors=tensors,
        **{name: spread(getattr(rows, name), 1) for name in ROW_COLUMNS[4:]},
    )
