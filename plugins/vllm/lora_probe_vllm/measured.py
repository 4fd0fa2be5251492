"""What is measured in one step, layer by layer, and the columns of the trace that it becomes.

In: tensors of the LoRA layers on their device, each of a whole fused layer: q, k and v are measured together. Out:
arrays of the host, `[rows, modules]`, NaN for modules that did not run. All layers are copied to the host at once, when
the step is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_probe.names import Key
from lora_probe.recording import Floats
from lora_probe_vllm.rows import StepRows

MOST_CHUNKS = 64
"""Norms of the slices of a layer are computed in one operation if their widths have a common divisor that divides the
layer's output into no more chunks than this."""

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Column:
    """One slice of a recorded layer: a column of the trace. `layer` is the layer's number in the recording."""

    key: Key
    layer: int
    slice: int


@dataclass
class Routed:
    """One layer of experts in one step. `experts: [rows, top_k]`; for each projection x `[sampled, top_k, in]` and
    delta `[sampled, top_k, out]` of the sampled rows."""

    experts: torch.Tensor
    samples: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass
class Head:
    """The head over the vocabulary in one step. It has a row for each request, that of the token that is sampled.
    `slots: [requests]`; of the requests with the numbers `sampled`, `x: [sampled, in]` and `delta: [sampled,
    vocabulary]`."""

    slots: torch.Tensor
    sampled: list[int]
    x: torch.Tensor | None = None
    delta: torch.Tensor | None = None


@dataclass
class Step:
    """One forward pass while it runs. Tensors are `[rows, ...]`, without the padding; those of layers are by the number
    of the layer, and have the norms of all of its chunks (`slice_norms`)."""

    rows: StepRows
    sampled: list[int]
    mixed: bool
    """Some of its rows belong to no active load, and what the kernel writes for them is measured."""
    slots: Any = None
    tokens: Any = None
    """The input token of each row, if they are kept."""
    active: tuple[int, ...] = ()
    """The slots that hold an adapter."""
    widths: dict[int, Sequence[int]] = field(default_factory=dict)
    """How wide each slice of a layer is."""
    shrink: dict[int, Any] = field(default_factory=dict)
    """`[slices, rows, r]`."""
    x_norm: dict[int, Any] = field(default_factory=dict)
    base_norm: dict[int, Any] = field(default_factory=dict)
    output_norm: dict[int, Any] = field(default_factory=dict)
    written_norm: dict[int, Any] = field(default_factory=dict)
    inner: dict[int, Any] = field(default_factory=dict)
    routed: dict[int, Routed] = field(default_factory=dict)
    """What ran in layers of experts."""
    heads: dict[int, Head] = field(default_factory=dict)
    sketch: dict[Key, Any] = field(default_factory=dict)
    samples: dict[Key, tuple[Any, Any]] = field(default_factory=dict)
    halves: dict[Key, tuple[tuple[Any, Any], tuple[Any, Any]]] = field(default_factory=dict)
    """Samples of fully sharded layers: x and this rank's part of x·Aᵀ, then all of x·Aᵀ and delta."""
    x: dict[Key, Any] = field(default_factory=dict)
    base: dict[Key, Any] = field(default_factory=dict)
    delta: dict[Key, Any] = field(default_factory=dict)


def norm(rows: torch.Tensor) -> torch.Tensor:
    """`[rows, ...]` without the last axis."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)


def without_padding(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` rows. Most steps have no others, and a view of all of them takes half as long as a norm."""
    return rows if len(rows) == count else rows[:count]


def slice_norms(rows: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Norms of the chunks of a layer's output `[rows, out]`: `[rows, chunks]`. A slice has one or more chunks."""
    width, _ = _chunks(tuple(widths))
    if width is not None:
        return norm(rows.reshape(len(rows), -1, width))
    return torch.stack([norm(part) for part in rows.split(list(widths), dim=-1)], dim=-1)


@lru_cache(maxsize=256)
def _chunks(widths: tuple[int, ...]) -> tuple[int | None, tuple[int, ...]]:
    """The width of a chunk, None if each slice is one chunk of its own width; and how many chunks each slice has."""
    width = gcd(*widths)
    if sum(widths) > MOST_CHUNKS * width:
        return None, (1,) * len(widths)
    return width, tuple(size // width for size in widths)


@dataclass(frozen=True)
class _Arrangement:
    """The columns among the slices of the layers that ran, in the order in which they ran."""

    where: Indices
    """The numbers of the columns whose layers ran."""
    slices: Indices
    """For each of these the number of its slice among all slices of all layers that ran."""
    layers: Indices
    """For each of these the number of its layer among those that ran."""
    starts: Indices
    """The first chunk of every slice."""
    whole: bool
    """Every slice is one chunk."""
    in_order: bool
    """The columns are exactly the slices of the layers, in the same order."""


class Columns:
    """The columns of a recording in their order, and how the measurements of a step become them."""

    def __init__(self, columns: Iterable[Column]) -> None:
        self._columns = tuple(columns)
        self._layers = np.array([column.layer for column in self._columns], np.intp)
        self._arrangements: dict[tuple[int, ...], _Arrangement] = {}

    def norms(self, values: Mapping[int, Any], step: Step) -> Floats:
        """Norms of slices `[rows, modules]` from those of the chunks of every layer that ran."""
        if not values:
            return self._missing(len(step.rows))
        arrangement = self._arrangement(values, step)
        chunks = torch.cat(list(values.values()), dim=1).cpu().numpy()
        if not arrangement.whole:
            squares = np.add.reduceat(np.square(chunks, dtype=np.float64), arrangement.starts, axis=1)
            chunks = np.sqrt(squares).astype(np.float32)
        of_slices = chunks if arrangement.in_order else chunks[:, arrangement.slices]
        return self._wide(len(step.rows), of_slices, arrangement.where)

    def of_layers(self, values: Mapping[int, Any], step: Step) -> Floats:
        """`[rows, modules]` from one value a row of every layer that ran."""
        if not values:
            return self._missing(len(step.rows))
        arrangement = self._arrangement(values, step)
        table = torch.stack(list(values.values()), dim=1).cpu().numpy()
        return self._wide(len(step.rows), table[:, arrangement.layers], arrangement.where)

    def of_modules(self, values: Mapping[Key, Any], count: int, *shape: int) -> Floats:
        """`[rows, modules, *shape]` from a value for each module that ran."""
        where = [number for number, column in enumerate(self._columns) if column.key in values]
        if not where:
            return self._missing(count, *shape)
        table = torch.stack([values[self._columns[number].key] for number in where], dim=1).cpu().numpy()
        return self._wide(count, table, np.array(where, np.intp), *shape)

    def stack(self, step: Step, grams: Mapping[int, Any], claimed: Any = None) -> Stacked:
        """‖delta‖² = shrink·G·shrinkᵀ, one batched product for each slot that the step uses. `grams` are the G of each
        slot, `[modules, r, r]`.

        For rows that are not `claimed` by a load (`[rows]`; by default those without an adapter) it is the norm that
        the kernel wrote (`step.written_norm`). If that was not measured it is zero where the shrink is zero, and NaN
        elsewhere. For rows without an adapter it must be zero.
        """
        count, modules = len(step.rows), len(self._columns)
        if not step.shrink:
            return Stacked(np.zeros((count, modules, 0), np.float32), self._missing(count), np.array([], np.intp))
        arrangement = self._arrangement(step.shrink, step)
        where = arrangement.where
        shrink = torch.cat([values[:, :count] for values in step.shrink.values()])
        if not arrangement.in_order:
            shrink = shrink[torch.from_numpy(arrangement.slices).to(shrink.device)]
        total = torch.zeros(shrink.shape[:2], dtype=torch.float32, device=shrink.device)
        for slot, gram in grams.items():
            of_modules = gram if len(where) == modules else gram[where]
            squares = ((shrink @ of_modules) * shrink).sum(-1).clamp_(min=0)
            total += squares * (step.slots == slot)
        computed = total.sqrt_().T.cpu().numpy()
        own = step.rows.columns.lora != 0 if claimed is None else claimed
        host = shrink.transpose(0, 1).cpu().numpy()
        if not own.all():
            # Without a measurement: nothing times B is nothing.
            unmeasured = np.where(host[~own].any(axis=-1), np.float32(np.nan), np.float32(0))
            written = self.norms(step.written_norm, step)[~own][:, where]
            measured = np.isin(self._layers[where], list(step.written_norm))
            computed[~own] = np.where(measured, written, unmeasured)
        return Stacked(self._wide(count, host, where, shrink.shape[-1]), self._wide(count, computed, where), where)

    def _arrangement(self, ran: Mapping[int, Any], step: Step) -> _Arrangement:
        layers = tuple(ran)
        arrangement = self._arrangements.get(layers)
        if arrangement is None:
            if len(self._arrangements) > len(self._columns):
                self._arrangements.clear()
            arrangement = self._arrangements[layers] = self._arrange(layers, step)
        return arrangement

    def _arrange(self, layers: tuple[int, ...], step: Step) -> _Arrangement:
        chunks = [_chunks(tuple(step.widths[layer]))[1] for layer in layers]
        of_slices = [count for of_layer in chunks for count in of_layer]
        first = dict(zip(layers, accumulate(map(len, chunks), initial=0), strict=False))
        order = {layer: number for number, layer in enumerate(layers)}
        ran = [(number, column) for number, column in enumerate(self._columns) if column.layer in order]
        slices = [first[column.layer] + column.slice for _, column in ran]
        return _Arrangement(
            where=np.array([number for number, _ in ran], np.intp),
            slices=np.array(slices, np.intp),
            layers=np.array([order[column.layer] for _, column in ran], np.intp),
            starts=np.array([0, *accumulate(of_slices[:-1])], np.intp),
            whole=max(of_slices) == 1,
            in_order=slices == list(range(len(of_slices))),
        )

    def _missing(self, count: int, *shape: int) -> Floats:
        """`[rows, modules, *shape]` where no module ran."""
        return np.full((count, len(self._columns), *shape), np.nan, np.float32)

    def _wide(self, count: int, values: Floats, where: Indices, *shape: int) -> Floats:
        """`[rows, modules, *shape]`, where `values` are those of the modules `where`."""
        if len(where) == len(self._columns):
            return values
        wide = self._missing(count, *shape)
        wide[:, where] = values
        return wide


@dataclass(frozen=True)
class Stacked:
    """A step's shrink of all modules in one array `[rows, modules, r]`, and ‖delta‖ `[rows, modules]` from it."""

    shrink: Floats
    delta_norm: Floats
    present: Indices
    """The numbers of the modules that ran."""
