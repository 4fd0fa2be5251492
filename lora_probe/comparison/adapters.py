"""What differs between the adapters that two runs loaded, as far as both traces recorded it.

In: two traces. Out: an `AdapterDifference` for each way in which modules differ. Engines record rank, scaling and
‖s·B·A‖ of each pair from the file, before they round it, so these can be compared whatever the dtypes of the runs are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_probe.names import Key, name_modules, natural, path_of
from lora_probe.precision import FLOAT32
from lora_probe.recording import Floats, Load, ModuleRecord, Trace
from lora_probe.recording.placed import grams_of

Kind = Literal["rank", "scaling", "A", "B", "A or B"]

SAME_SCALING = 16 * FLOAT32.round_off
"""Scalings that are closer than this are the same number, computed in another order."""


def counted(keys: Sequence[Key], total: int) -> str:
    """Some of `total` modules: how many, and which: `1 of 9 modules (layer 2 q_proj)`, `all 9 modules`."""
    if len(keys) == total > 1:
        return f"all {total} modules"
    return f"{len(keys)} of {total} modules ({name_modules(map(path_of, keys))})"


@dataclass(frozen=True)
class AdapterDifference:
    """Modules that differ in the same way. `values` are the rank or the scaling of the reference and of the candidate;
    for A and B ‖B·A‖ of the first of `keys`. `factors` are the smallest and the largest quotient of these values.
    `same_product`: ‖B·A‖ of all `keys` is the same, so that nothing else is known to differ. `total` is how many
    modules both adapters have."""

    kind: Kind
    keys: tuple[Key, ...]
    values: tuple[float, float]
    factors: tuple[float, float]
    same_product: bool
    total: int

    @property
    def text(self) -> str:
        """One clause: `scaling is 8 instead of 2 in all 9 modules`."""
        where = counted(self.keys, self.total)
        if self.kind in ("rank", "scaling"):
            same = "; ‖B·A‖ is the same" if self.same_product else ""
            return f"{self.kind} is {self.values[1]:.6g} instead of {self.values[0]:.6g} in {where}{same}"
        low, high = (f"{factor:.4g}" for factor in self.factors)
        times = f"{low} times" if low == high else f"{low} to {high} times"
        return f"{self.kind} differs in {where}: ‖B·A‖ is {times} that of the reference"


@dataclass(frozen=True)
class _Pair:
    """One module in both adapters, and G of B in both runs (None if it was not recorded)."""

    key: Key
    reference: ModuleRecord
    candidate: ModuleRecord
    grams: tuple[Floats | None, Floats | None]

    @property
    def products(self) -> tuple[float, float] | None:
        """‖B·A‖ of both; None if it was not recorded, is multiplied by 0, or is not a number."""
        one, two = self.reference, self.candidate
        if not one.scaling or not two.scaling or one.norm is None or two.norm is None:
            return None
        before, after = one.norm / abs(one.scaling), two.norm / abs(two.scaling)
        return (before, after) if math.isfinite(before) and math.isfinite(after) else None

    def same_product(self, limit: float) -> bool:
        if self.products is None:
            return False
        before, after = self.products
        return abs(after - before) <= limit * before


def adapter_differences(
    reference: Trace, candidate: Trace, loads: tuple[Load, Load], limit: float
) -> tuple[AdapterDifference, ...]:
    """How the adapters of two loads differ, the first one of the reference. Norms that differ by less than `limit` are
    the same, which allows for an adapter that was saved in another dtype. No difference means that none is known."""
    if loads[0].digest == loads[1].digest:
        return ()
    pairs = list(_pairs(reference, candidate, loads))
    groups: dict[tuple[Kind, float, float], list[tuple[Key, float, float]]] = {}
    for pair in pairs:
        for kind, before, after in _differences(pair, limit):
            # Each rank and each scaling is a group; values of A and B are different in every module.
            same = (before, after) if kind in ("rank", "scaling") else (0.0, 0.0)
            groups.setdefault((kind, *same), []).append((pair.key, before, after))
    unchanged = {pair.key for pair in pairs if pair.same_product(limit)}
    return tuple(_difference(kind, members, unchanged, len(pairs)) for (kind, _, _), members in groups.items())


def different_files(loads: tuple[Load, Load]) -> tuple[str, str] | None:
    """The folders of the two adapters if their files differ."""
    return (loads[0].path, loads[1].path) if loads[0].digest != loads[1].digest else None


def _pairs(reference: Trace, candidate: Trace, loads: tuple[Load, Load]) -> Iterator[_Pair]:
    """The modules that both files have. Those of one file alone are in the ledgers."""
    records = []
    for trace, load in zip((reference, candidate), loads, strict=True):
        modules = trace.modules.items()
        records.append({key: m for (number, key), m in modules if number == load.load and m.stored_as is not None})
    grams = _grams(reference, loads[0]), _grams(candidate, loads[1])
    for key in sorted(records[0].keys() & records[1].keys(), key=lambda key: natural(key[0])):
        yield _Pair(key, records[0][key], records[1][key], (grams[0].get(key), grams[1].get(key)))


def _grams(trace: Trace, load: Load) -> dict[Key, Floats]:
    """G of each module that has rows in a trace, as far as it was kept."""
    rows = trace.rows
    if rows is None:
        return {}
    held = ((key, grams_of(rows.placed, load.load, number)) for number, key in enumerate(rows.modules))
    return {key: weights.gram for key, weights in held if weights is not None}


def _differences(pair: _Pair, limit: float) -> Iterator[tuple[Kind, float, float]]:
    """What differs in one module, with the value in the reference and in the candidate."""
    one, two = pair.reference, pair.candidate
    if one.rank is not None and two.rank is not None and one.rank != two.rank:
        yield "rank", float(one.rank), float(two.rank)
    before, after = one.scaling, two.scaling
    if before is not None and after is not None and abs(after - before) > SAME_SCALING * abs(before):
        yield "scaling", before, after
    if pair.products is not None and not pair.same_product(limit):
        yield _half(pair, limit), *pair.products


def _half(pair: _Pair, limit: float) -> Kind:
    """Which of A and B differs, as G without the scaling shows it."""
    first, second = pair.grams
    scaling_one, scaling_two = pair.reference.scaling, pair.candidate.scaling
    if first is None or second is None or not scaling_one or not scaling_two:
        return "A or B"
    rank = min(len(first), len(second))
    one = first[:rank, :rank] / np.float32(scaling_one) ** 2
    two = second[:rank, :rank] / np.float32(scaling_two) ** 2
    # Not `<=`: the G of a damaged adapter contains NaN.
    same = np.linalg.norm(two - one) < limit * np.linalg.norm(one)
    return "A" if same else "B"


def _difference(kind: Kind, members: list[tuple[Key, float, float]], same: set[Key], total: int) -> AdapterDifference:
    factors = [after / before if before else float("inf") for _, before, after in members]
    keys = tuple(key for key, _, _ in members)
    return AdapterDifference(kind, keys, members[0][1:], (min(factors), max(factors)), same.issuperset(keys), total)
