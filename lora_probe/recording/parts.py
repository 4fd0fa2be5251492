"""The rows of a step, divided by the load that they ran with, and each part without the columns that tell nothing.

In: the `Rows` of a step, whose columns are the modules of all active loads at the widest rank; and the module records
of each load. Out: `Part`s. The rows of a load have the columns of its own modules, at its own rank. Rows without a load
have no columns at all, unless they have a contribution that nobody requested, or outputs for a comparison of models.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lora_probe.names import Key
from lora_probe.recording.placed import Floats, Placed
from lora_probe.recording.records import ModuleRecord
from lora_probe.recording.rows import Rows, selected

MOST_LOADS = 256
"""The modules of so many loads are remembered, most recently used first. Rows of a load whose modules were forgotten
keep all columns."""

WITHOUT_COLUMNS, WITHOUT_LOAD = -2, -1

Ranks = dict[Key, int | None]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """Rows that belong into the same segment. `load` is the number of their load, WITHOUT_LOAD, or WITHOUT_COLUMNS."""

    load: int
    rows: Rows


@dataclass(frozen=True)
class _Layout:
    """The columns of one load among those of a step: which they are, its rank there (None: as wide as they are), and
    its weights. Valid while the step has the same `modules`, and the load the same weights (`source`)."""

    modules: tuple[Key, ...]
    source: Placed | None
    columns: npt.NDArray[np.intp] | None
    rank: int | None
    placed: Placed | None


class Parts:
    """Divides the rows of every step of a recording."""

    def __init__(self) -> None:
        self._ranks: OrderedDict[int, Ranks] = OrderedDict()
        self._layouts: dict[int, _Layout] = {}

    def announce(self, record: ModuleRecord) -> None:
        """A module of a load. Only those that the adapter stores count: the others never run."""
        if record.stored_as is None:
            return
        if record.load not in self._ranks and len(self._ranks) >= MOST_LOADS:
            forgotten, _ = self._ranks.popitem(last=False)
            self._layouts.pop(forgotten, None)
        self._ranks.setdefault(record.load, {})[record.key] = record.rank
        # What no load had until now may be a column of this one alone.
        self._layouts.clear()

    def of(self, rows: Rows) -> Iterator[Part]:
        """The parts of a step, each with at least one row."""
        loads = np.unique(rows.load).tolist()
        for load in loads:
            chosen = rows.load == load
            if load >= 0:
                yield Part(load, self._of_load(rows, None if len(loads) == 1 else chosen, load))
                continue
            of_none = replace(rows, placed={})
            telling = chosen & _with_columns(rows)
            if telling.any():
                yield Part(WITHOUT_LOAD, selected(of_none, telling))
            if (bare := chosen & ~telling).any():
                yield Part(WITHOUT_COLUMNS, selected(of_none, bare, np.array([], np.intp)))

    def _of_load(self, rows: Rows, chosen: Bools | None, load: int) -> Rows:
        layout = self._layout(rows, load)
        part = selected(rows, chosen, layout.columns)
        if layout.rank is not None and part.shrink is not None and not _any_number(part.shrink[..., layout.rank :]):
            part = replace(part, shrink=part.shrink[..., : layout.rank])
        return replace(part, placed={load: layout.placed} if layout.placed is not None else {})

    def _layout(self, rows: Rows, load: int) -> _Layout:
        source = rows.placed.get(load)
        layout = self._layouts.get(load)
        if layout is None or layout.source is not source or layout.modules != rows.modules:
            layout = self._layouts[load] = self._new_layout(rows.modules, load, source)
        return layout

    def _new_layout(self, modules: tuple[Key, ...], load: int, source: Placed | None) -> _Layout:
        ranks = self._ranks.get(load)
        if not ranks:
            return _Layout(modules, source, None, None, source)
        self._ranks.move_to_end(load)
        others = {key for number, of_load in self._ranks.items() if number != load for key in of_load}
        numbers = [number for number, key in enumerate(modules) if key in ranks or key not in others]
        columns = np.array(numbers, np.intp) if len(numbers) < len(modules) else None
        widths = [ranks.get(modules[number]) for number in numbers]
        rank = None if None in widths else max((width for width in widths if width is not None), default=None)
        placed = source
        if placed is not None and columns is not None:
            gram = placed.gram[columns] if placed.gram is not None else None
            placed = Placed(tuple(placed.digests[number] for number in numbers), gram)
        if placed is not None and placed.gram is not None and rank is not None:
            if _narrow(placed.gram, rank):
                placed = Placed(placed.digests, placed.gram[:, :rank, :rank])
            else:
                rank = None
        return _Layout(modules, source, columns, rank, placed)


def _with_columns(rows: Rows) -> Bools:
    """The rows without a load whose columns tell something: all, if outputs are compared, or if the model has no LoRA
    layers; else those that have a contribution. NaN is one, where the module ran."""
    without_layers = np.isnan(rows.x_norm).all() and not np.isnan(rows.output_norm).all()
    if rows.sketch is not None or without_layers:
        return np.ones(len(rows), np.bool_)
    delta = rows.delta_norm
    contributed = (delta > 0) | (np.isnan(delta) & ~np.isnan(rows.x_norm))
    telling: Bools = contributed.any(axis=1)
    if rows.shrink is not None:
        telling |= (np.abs(rows.shrink) > 0).any(axis=(1, 2))
    return telling


def _any_number(values: Floats) -> bool:
    """Whether anything but 0 and NaN is in `values`."""
    return bool(((values > 0) | (values < 0)).any())


def _narrow(gram: Floats, rank: int) -> bool:
    """Whether nothing is lost if every G is cut to `rank`. An unknown G is NaN throughout."""
    of_known = gram[~np.isnan(gram).all(axis=(1, 2))]
    return not (of_known[:, rank:].any() or of_known[:, :, rank:].any())
