"""Rows: the measurements of every module at every position of every request, in columns.

In: arrays of one step, or of many. Out: `Rows`, joined, widened to more modules, selected, and looked up by request and
position.
All facts about a column are in the metadata of its field; other code reads them from COLUMNS.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lora_probe.names import Key
from lora_probe.recording.placed import Floats, Placed, at_rank, joined_placed
from lora_probe.recording.records import LEVELS, Level, Served

Writer = Literal["every run", "runs of an adapter", "scored runs"]
NO_ADAPTER, NOT_IN_ITS_SLOT = -1, -2
"""Instead of the number of a load: the row requested no adapter; it requested one and did not run with the slot of a
load of that adapter."""


@dataclass(frozen=True)
class Column:
    """The facts about a column. Axes with the same name have the same length; `dtype` is in the spelling of
    safetensors.

    A column of single modules has one table for each module that ran, and every table has its own width.
    """

    dtype: str
    axes: tuple[str, ...]
    written_by: Writer
    levels: tuple[Level, ...]
    of_single_modules: bool = False


def _column(
    dtype: str,
    *axes: str,
    by: Writer = "every run",
    levels: tuple[Level, ...] = LEVELS[1:],
    of_single_modules: bool = False,
) -> dict[str, Column]:
    """The metadata of a column's field. By default every level keeps it except `events`, which keeps no rows."""
    return {"column": Column(dtype, axes, by, levels, of_single_modules)}


_NORM = _column("F32", "rows", "modules", by="runs of an adapter")
_TABLE = _column("F32", "rows", "width", by="runs of an adapter", levels=("tensors",), of_single_modules=True)


@dataclass(frozen=True)
class Rows:
    """Rows of one step or of many, in columns. NaN means that the row did not run there, or that it ran without a load
    and had no contribution: of such rows no columns are kept (`parts.py`).

    `load` is the number of the load that a row requested and ran with, NO_ADAPTER or NOT_IN_ITS_SLOT. `placed` contains
    the weights of each load, `served` how each request was served, if the engine reports that. `inner` is ⟨output,
    delta⟩ of modules whose input is sharded over ranks: there the base output of a rank is only a partial sum. `token`
    is the input token of each row, if the engine was asked to keep tokens. `sketch` summarises the modules' whole
    outputs. `x`, `base` and `delta` are whole tensors, by module.
    """

    modules: tuple[Key, ...]
    requests: tuple[str, ...]
    request: npt.NDArray[np.int32] = field(metadata=_column("I32", "rows"))
    position: npt.NDArray[np.int32] = field(metadata=_column("I32", "rows"))
    phase: npt.NDArray[np.int8] = field(metadata=_column("I8", "rows"))
    load: npt.NDArray[np.int32] = field(metadata=_column("I32", "rows"))
    x_norm: Floats = field(metadata=_NORM)
    base_norm: Floats = field(metadata=_NORM)
    delta_norm: Floats = field(metadata=_NORM)
    output_norm: Floats = field(metadata=_column("F32", "rows", "modules"))
    shrink: Floats | None = field(
        default=None,
        metadata=_column("F32", "rows", "modules", "r", by="runs of an adapter", levels=("shrink", "tensors")),
    )
    inner: Floats | None = field(default=None, metadata=_NORM)
    token: npt.NDArray[np.int32] | None = field(default=None, metadata=_column("I32", "rows"))
    sketch: Floats | None = field(default=None, metadata=_column("F32", "rows", "modules", "sketch", by="scored runs"))
    x: Mapping[Key, Floats] | None = field(default=None, metadata=_TABLE)
    base: Mapping[Key, Floats] | None = field(default=None, metadata=_TABLE)
    delta: Mapping[Key, Floats] | None = field(default=None, metadata=_TABLE)
    placed: Mapping[int, Placed] = field(default_factory=dict)
    served: Mapping[str, Served] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.request)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        arrays = [array for name in ARRAYS if (array := getattr(self, name)) is not None]
        tables = [table for name in TABLES for table in (getattr(self, name) or {}).values()]
        return sum(column.nbytes for column in (*arrays, *tables))


COLUMNS: dict[str, Column] = {f.name: f.metadata["column"] for f in fields(Rows) if "column" in f.metadata}
REQUIRED = tuple(f.name for f in fields(Rows) if f.name in COLUMNS and f.default is MISSING)
"""The columns that all rows have."""
ARRAYS = tuple(name for name, column in COLUMNS.items() if not column.of_single_modules)
TABLES = tuple(name for name, column in COLUMNS.items() if column.of_single_modules)


def kept(name: str, level: Level) -> bool:
    """Whether a level keeps a column."""
    return level in COLUMNS[name].levels


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Several `Rows` of the same modules as one. The tables of requests and of loads are joined. Their levels and ranks
    may differ: shrink and G are padded with zeros, and a column that a part did not keep is NaN in its rows."""
    requests: dict[str, int] = {}
    numbers = []
    for part in parts:
        for request in part.requests:
            requests.setdefault(request, len(requests))
        table = np.array([requests[name] for name in part.requests], dtype=np.int32)
        numbers.append(table[part.request] if len(part.requests) else part.request)
    columns: dict[str, Any] = {name: _concatenated(parts, name) for name in ARRAYS}
    columns |= {name: _concatenated_tables(parts, name) for name in TABLES}
    columns["request"] = np.concatenate(numbers)
    modules = parts[0].modules
    placed = joined_placed(((part.modules, part.placed) for part in parts), modules)
    served = {request: facts for part in parts for request, facts in part.served.items()}
    rows = Rows(modules, tuple(requests), placed=placed, served=served, **columns)
    return replace(rows, placed=as_wide(placed, rows.shrink))


def side_by_side(parts: Sequence[Rows]) -> Rows:
    """The rows of several engines together, which may have recorded other modules."""
    if len(parts) == 1:
        return parts[0]
    keys = tuple(dict.fromkeys(key for part in parts for key in part.modules))
    return concatenate([widened(part, keys) for part in parts])


def as_wide(placed: Mapping[int, Placed], shrink: Floats | None) -> dict[int, Placed]:
    """The loads with a G as wide as `shrink`, or as the widest G if that is wider."""
    ranks = [of_load.gram.shape[-1] for of_load in placed.values() if of_load.gram is not None]
    rank = max([*ranks, shrink.shape[-1] if shrink is not None else 0])
    return {load: replace(p, gram=None if p.gram is None else at_rank(p.gram, rank)) for load, p in placed.items()}


def _padded(shrink: Floats, rank: int) -> Floats:
    """`[rows, modules, r]` padded to a larger rank with zeros. Without any rank no module ran: NaN."""
    width = shrink.shape[-1]
    return np.pad(shrink, ((0, 0), (0, 0), (0, rank - width)), constant_values=0 if width else np.nan)


def of_load(rows: Rows, load: int) -> Rows:
    """The rows of one load. Segments of older traces have several."""
    chosen = rows.load == load
    return rows if chosen.all() else selected(rows, chosen)


def of_loads(rows: Rows, loads: Collection[int], requests: Collection[str]) -> Rows:
    """The rows of some loads, and those of `requests`, which may have run without the load that they asked for."""
    asked = np.array([request in requests for request in rows.requests], np.bool_)
    ran = np.isin(rows.load, list(loads))
    return selected(rows, ran | asked[rows.request] if len(asked) else ran)


def selected(
    rows: Rows, chosen: npt.NDArray[np.bool_ | np.intp] | None, columns: npt.NDArray[np.intp] | None = None
) -> Rows:
    """Some of the rows, and of their columns; None stands for all. The loads stay as they are."""
    if chosen is None and columns is None:
        return rows
    keys = rows.modules if columns is None else tuple(rows.modules[number] for number in columns)
    everything = slice(None)
    of_rows = everything if chosen is None else chosen
    arrays: dict[str, Any] = {}
    for name in ARRAYS:
        values = getattr(rows, name)
        if values is not None:
            values = values[of_rows]
            if columns is not None and "modules" in COLUMNS[name].axes:
                values = values[:, columns]
        arrays[name] = values
    kept_keys = set(keys)
    for name in TABLES:
        tables: Mapping[Key, Floats] | None = getattr(rows, name)
        if tables is not None:
            arrays[name] = {key: values[of_rows] for key, values in tables.items() if key in kept_keys} or None
    names, arrays["request"] = np.unique(arrays["request"], return_inverse=True)
    arrays["request"] = arrays["request"].astype(np.int32)
    requests = tuple(rows.requests[number] for number in names.tolist())
    return replace(rows, modules=keys, requests=requests, **arrays)


def output_rows(modules: tuple[Key, ...], request: str, phases: Sequence[int], norm: Floats, sketch: Floats) -> Rows:
    """The first rows of a request of a model without LoRA layers. They only contain the outputs of its modules:
    `norm: [rows, modules]` and `sketch: [rows, modules, 32]`."""
    count = len(phases)
    missing = [name for name in REQUIRED if COLUMNS[name].written_by == "runs of an adapter"]
    nothing: dict[str, Any] = dict.fromkeys(missing, np.full_like(norm, np.nan))
    return Rows(
        modules=modules,
        requests=(request,),
        request=np.zeros(count, np.int32),
        position=np.arange(count, dtype=np.int32),
        phase=np.array(phases, np.int8),
        load=np.full(count, -1, np.int32),
        output_norm=norm,
        sketch=sketch,
        **nothing,
    )


def places(rows: Rows) -> dict[tuple[str, int], int]:
    """Row numbers by request and position; if a row was computed twice, the last one counts."""
    names = [rows.requests[number] for number in rows.request]
    return {at: number for number, at in enumerate(zip(names, rows.position.tolist(), strict=True))}


def widened(rows: Rows, keys: tuple[Key, ...]) -> Rows:
    """The same rows with columns for `keys`; modules that did not run are NaN."""
    if rows.modules == keys:
        return rows
    numbers = {key: number for number, key in enumerate(keys)}
    where = np.array([numbers[key] for key in rows.modules], dtype=np.intp)
    wide = {name: _spread(getattr(rows, name), COLUMNS[name], where, len(keys)) for name in ARRAYS}
    return replace(rows, modules=keys, placed=joined_placed([(rows.modules, rows.placed)], keys), **wide)


def _spread(values: Any, column: Column, where: npt.NDArray[np.intp], count: int) -> Any:
    """A column widened to `count` modules, with its own values at `where`."""
    if values is None or "modules" not in column.axes:
        return values
    axis = column.axes.index("modules")
    shape = list(values.shape)
    shape[axis] = count
    wide = np.full(shape, np.nan, dtype=np.float32)
    wide[(slice(None),) * axis + (where,)] = values
    return wide


def _concatenated(parts: Sequence[Rows], name: str) -> Any:
    """One column of all parts; None if no part has it."""
    values = [getattr(part, name) for part in parts]
    kept_by = [column for column in values if column is not None]
    if not kept_by:
        return None
    if "r" in COLUMNS[name].axes:
        rank = max(column.shape[-1] for column in kept_by)
        values = [None if column is None else _padded(column, rank) for column in values]
    shape = next(column for column in values if column is not None).shape[1:]
    filling = np.nan if kept_by[0].dtype == np.float32 else -1
    missing = [np.full((len(part), *shape), filling, kept_by[0].dtype) for part in parts if getattr(part, name) is None]
    return np.concatenate([column if column is not None else missing.pop(0) for column in values])


def _concatenated_tables(parts: Sequence[Rows], name: str) -> dict[Key, Floats] | None:
    """x, base or delta of all parts; NaN in the rows of a part where the module did not run."""
    tables: list[Mapping[Key, Floats]] = [getattr(part, name) or {} for part in parts]
    widths = {key: values.shape[1] for of_part in tables for key, values in of_part.items()}
    if not widths:
        return None
    return {
        key: np.concatenate(
            [
                of_part[key] if key in of_part else np.full((len(part), width), np.nan, np.float32)
                for part, of_part in zip(parts, tables, strict=True)
            ]
        )
        for key, width in widths.items()
    }
