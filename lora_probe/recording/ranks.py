"""The rows of tensor- and pipeline-parallel ranks as one: what a single worker would have recorded.

In: the `Rows` of each rank, and what each of them has of every module (`Shard`). Out: `Rows`. Every rank runs the same
rows, with its own part of each layer:

- a module that is sharded along its output: norms of outputs add up in quadrature over the different parts; x and x·Aᵀ
  are the same on every rank;
- a module that is sharded along its input: x·Aᵀ adds up, and the contribution follows from it; x adds up in quadrature;
  the output is the sum over all ranks already. A rank's base output is a partial sum, so ‖base‖² = ‖output‖² -
  2⟨output, delta⟩ + ‖delta‖², where ⟨output, delta⟩ adds up over the ranks;
- a module that is sharded along both, as fully sharded ones are: the same, but every rank has all of x·Aᵀ, and the
  contribution adds up in quadrature;
- a module that is whole on a rank, or on another pipeline rank: as it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_probe.names import Key
from lora_probe.recording.placed import Floats, Placed, at_rank
from lora_probe.recording.records import Shard
from lora_probe.recording.rows import TABLES, Rows, concatenate, selected, widened

Shards = Mapping[Key, Shard | None]


NORMS = ("x_norm", "base_norm", "delta_norm", "output_norm")


@dataclass(frozen=True)
class _Member:
    """One rank that has a part of a module: its rows, in the common order, and the module's column there."""

    rows: Rows
    column: int


def joined_ranks(ranks: Sequence[tuple[Rows, Shards]]) -> Rows:
    """One `Rows` for all ranks. A module of which a part is missing is NaN, and so is a module in the rows that not all
    ranks with a part of it have."""
    stages: dict[tuple[Key, ...], list[tuple[Rows, Shards]]] = {}
    for rows, shards in ranks:
        stages.setdefault(rows.modules, []).append((rows, shards))
    return _in_line([_joined_stage(stage) for stage in stages.values()])


def _in_line(stages: Sequence[Rows]) -> Rows:
    """The rows of pipeline stages, each of which has other modules."""
    if len(stages) == 1:
        return stages[0]
    keys = tuple(dict.fromkeys(key for rows in stages for key in rows.modules))
    places = [_places(rows) for rows in stages]
    order = dict.fromkeys(at for of_stage in places for at in of_stage)
    # Every row as the first stage that has it, with the columns of all stages.
    owners = [next(number for number, of_stage in enumerate(places) if at in of_stage) for at in order]
    parts = []
    for number, (rows, of_stage) in enumerate(zip(stages, places, strict=True)):
        own = [of_stage[at] for at, owner in zip(order, owners, strict=True) if owner == number]
        parts.append(widened(selected(rows, np.array(own, np.intp)), keys))
    joined = concatenate(parts)
    row_of = {at: number for number, at in enumerate(_places(joined))}
    for rows, of_stage in zip(stages, places, strict=True):
        _copy_columns(rows, of_stage, joined, row_of)
    return joined


def _copy_columns(
    rows: Rows, places: Mapping[tuple[str, int, int], int], joined: Rows, row_of: Mapping[tuple[str, int, int], int]
) -> None:
    """Write the columns of one stage into the joined rows."""
    here = np.array(list(places.values()), np.intp)
    there = np.array([row_of[at] for at in places], np.intp)
    columns = np.array([joined.modules.index(key) for key in rows.modules], np.intp)
    for name in NORMS:
        getattr(joined, name)[np.ix_(there, columns)] = getattr(rows, name)[here]
    if rows.shrink is not None and joined.shrink is not None:
        width = rows.shrink.shape[-1]
        joined.shrink[np.ix_(there, columns, np.arange(width))] = rows.shrink[here]
        joined.shrink[np.ix_(there, columns, np.arange(width, joined.shrink.shape[-1]))] = 0
    for name in TABLES:
        tables: dict[Key, Floats] = getattr(joined, name) or {}
        for key, values in (getattr(rows, name) or {}).items():
            tables[key][there] = values[here]


def _joined_stage(ranks: Sequence[tuple[Rows, Shards]]) -> Rows:
    """The ranks that have the same modules, with the rows that all of them have."""
    aligned = _aligned([rows for rows, _ in ranks])
    shards = [of_rank for _, of_rank in ranks]
    modules = [_members(aligned, shards, column) for column in range(len(aligned[0].modules))]
    ranks_of_shrink = [rows.shrink.shape[-1] for rows in aligned if rows.shrink is not None]
    joined = _Joined(aligned[0], max(ranks_of_shrink, default=None))
    for column, (members, axis) in enumerate(modules):
        if members:
            joined.add(column, members, axis)
    loads = dict.fromkeys(load for rows in aligned for load in rows.placed)
    return joined.result({load: _placed(load, modules) for load in loads})


def _aligned(ranks: Sequence[Rows]) -> list[Rows]:
    """The rows that all ranks have, in the order of the first one. A rank may have been killed earlier, or have removed
    other segments to keep its bound."""
    places = [_places(rows) for rows in ranks]
    common = [at for at in places[0] if all(at in others for others in places[1:])]
    numbers = [np.array([of_rank[at] for at in common], np.intp) for of_rank in places]
    return [selected(rows, of_rank) for rows, of_rank in zip(ranks, numbers, strict=True)]


def _places(rows: Rows) -> dict[tuple[str, int, int], int]:
    """The number of each row by its request, its position, and how often it was computed before (preemption)."""
    seen: dict[tuple[str, int], int] = {}
    places = {}
    names = [rows.requests[number] for number in rows.request]
    for number, at in enumerate(zip(names, rows.position.tolist(), strict=True)):
        seen[at] = seen.get(at, -1) + 1
        places[*at, seen[at]] = number
    return places


def _members(ranks: Sequence[Rows], shards: Sequence[Shards], column: int) -> tuple[list[_Member], str]:
    """The ranks that have different parts of a module, and the axis along which it is divided, "" if it is not."""
    key = ranks[0].modules[column]
    having = [(rows, of_rank.get(key)) for rows, of_rank in zip(ranks, shards, strict=True)]
    rows, shard = having[0]
    if shard is None:
        return [_Member(rows, column)], ""
    parts = {of.part: _Member(rows, column) for rows, of in reversed(having) if of is not None}
    whole = sorted(parts) == list(range(shard.parts))
    return [parts[number] for number in sorted(parts)] if whole else [], shard.axis


class _Joined:
    """The columns of all ranks together, one module after the other."""

    def __init__(self, first: Rows, rank: int | None) -> None:
        """`rank` is the widest of x·Aᵀ, None if it was not kept."""
        self._first = first
        shape = len(first), len(first.modules)
        self._columns = {name: np.full(shape, np.nan, np.float32) for name in NORMS}
        self._shrink = np.full((*shape, rank), np.nan, np.float32) if rank is not None else None
        self._tables: dict[str, dict[Key, Floats]] = {name: {} for name in TABLES}

    def add(self, number: int, members: Sequence[_Member], axis: str) -> None:
        """A module: the four norms, x·Aᵀ, and whole tensors if they were kept."""
        key = self._first.modules[number]
        outputs = _quadrature if axis == "output" else _of_first
        inputs = _quadrature if axis in ("input", "both") else _of_first
        deltas = _quadrature if axis in ("output", "both") else _of_first
        self._columns["x_norm"][:, number] = inputs(members, "x_norm")
        self._columns["output_norm"][:, number] = outputs(members, "output_norm")
        self._columns["delta_norm"][:, number] = deltas(members, "delta_norm")
        self._columns["base_norm"][:, number] = outputs(members, "base_norm")
        shrinks = [shrink for member in members if (shrink := _shrink(member)) is not None]
        if self._shrink is not None and len(shrinks) == len(members):
            summed = _sum(shrinks) if axis == "input" else shrinks[0]
            self._shrink[:, number, : summed.shape[-1]] = summed
            self._shrink[:, number, summed.shape[-1] :] = 0
        if axis == "input":
            self._columns["delta_norm"][:, number] = self._of_partial_sums(members, number)
        if axis in ("input", "both"):
            self._columns["base_norm"][:, number] = self._base_of_partial_sums(members, number)
        for name in TABLES:
            tables = [table for member in members if (table := (getattr(member.rows, name) or {}).get(key)) is not None]
            if len(tables) == len(members) and (axis != "input" or name == "x" or len({*map(np.shape, tables)}) == 1):
                self._tables[name][key] = _table(name, tables, axis)

    def _of_partial_sums(self, members: Sequence[_Member], number: int) -> Floats:
        """‖delta‖ from the sum of x·Aᵀ and from G, which every rank has whole."""
        norms = np.full(len(self._first), np.nan, np.float32)
        if self._shrink is None:
            return norms
        shrink = self._shrink[:, number]
        for load, gram in _grams(members[0]):
            chosen = self._first.load == load
            of_load = shrink[chosen].astype(np.float64)
            wide = at_rank(gram, shrink.shape[-1]).astype(np.float64)
            squares = np.einsum("nr,rs,ns->n", of_load, wide, of_load)
            norms[chosen] = np.sqrt(squares.clip(min=0))
        nothing = ~np.isnan(shrink).any(axis=-1) & ~shrink.any(axis=-1)
        norms[nothing] = 0
        return norms

    def _base_of_partial_sums(self, members: Sequence[_Member], number: int) -> Floats:
        inner = [member.rows.inner[:, member.column] for member in members if member.rows.inner is not None]
        if len(inner) < len(members):
            return np.full(len(self._first), np.nan, np.float32)
        output, delta = (self._columns[name][:, number].astype(np.float64) for name in ("output_norm", "delta_norm"))
        squares = output**2 - 2 * np.sum(inner, axis=0, dtype=np.float64) + delta**2
        base: Floats = np.sqrt(squares.clip(min=0)).astype(np.float32)
        return base

    def result(self, placed: Mapping[int, Placed]) -> Rows:
        tables = {name: self._tables[name] or None for name in TABLES}
        columns: dict[str, Any] = {**self._columns, **tables, "shrink": self._shrink}
        return replace(self._first, **columns, placed=placed, inner=None, sketch=None)


def _of_first(members: Sequence[_Member], name: str) -> Floats:
    values: Floats = getattr(members[0].rows, name)[:, members[0].column]
    return values


def _quadrature(members: Sequence[_Member], name: str) -> Floats:
    parts = np.stack([getattr(member.rows, name)[:, member.column] for member in members])
    values: Floats = np.sqrt(np.square(parts, dtype=np.float64).sum(axis=0)).astype(np.float32)
    return values


def _sum(parts: Sequence[Floats]) -> Floats:
    """The sum of arrays whose last axis may be padded to another rank."""
    width = max(part.shape[-1] for part in parts)
    parts = [np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, width - part.shape[-1])]) for part in parts]
    values: Floats = np.asarray(np.sum(np.stack(parts), axis=0, dtype=np.float64), np.float32)
    return values


def _table(name: str, tables: Sequence[Floats], axis: str) -> Floats:
    """x, the base output or the contribution of a module: side by side if it is divided, added up if each rank has a
    partial sum, and the same on all ranks otherwise."""
    if axis == "both":
        return _sum(tables) if name == "base" else np.concatenate(tables, axis=1)
    if axis == "input":
        return np.concatenate(tables, axis=1) if name == "x" else _sum(tables)
    return np.concatenate(tables, axis=1) if axis == "output" and name != "x" else tables[0]


def _shrink(member: _Member) -> Floats | None:
    shrink = member.rows.shrink
    return None if shrink is None else shrink[:, member.column]


def _grams(member: _Member) -> Iterator[tuple[int, Floats]]:
    for load, placed in member.rows.placed.items():
        if placed.gram is not None and np.isfinite(placed.gram[member.column]).all():
            yield load, placed.gram[member.column]


def _placed(load: int, modules: Sequence[tuple[list[_Member], str]]) -> Placed:
    """G of a load at every module: the sum over the parts of an output, as each has some rows of B; the same on all
    ranks otherwise. A sharded module has a digest if all ranks agree on that of the whole weights."""
    digests, grams = [], []
    for members, axis in modules:
        held = [(member.rows.placed[load], member.column) for member in members if load in member.rows.placed]
        seen = {of_load.digests[column] for of_load, column in held}
        digests.append(seen.pop() if len(seen) == 1 and len(held) == len(members) else "")
        parts = [of_load.gram[column] for of_load, column in held if of_load.gram is not None]
        widest = max((part.shape[-1] for part in parts), default=0)
        wide = [at_rank(part, widest) for part in parts]
        whole = len(parts) == len(members) and bool(parts)
        grams.append((_sum(wide) if axis in ("output", "both") else wide[0]) if whole else None)
    rank = max((gram.shape[-1] for gram in grams if gram is not None), default=0)
    if not rank:
        return Placed(tuple(digests))
    unknown = np.full((rank, rank), np.nan, np.float32)
    return Placed(tuple(digests), np.stack([unknown if gram is None else at_rank(gram, rank) for gram in grams]))
