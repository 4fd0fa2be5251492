"""Whether two runs of the same adapter multiply with the same s·B, and by which factor they differ.

In: two traces, and the dtype that decides. Out: a `WeightDifference` for the modules whose s·B is a multiple of the
reference's, and one for those that have another B. It follows from G = (s·B)ᵀ(s·B), which engines record of the weights
that they run with: rounding changes single values of B, and hardly their sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lora_probe.comparison.adapters import grams_in, loads_of_both
from lora_probe.names import Key, name_modules, natural, path_of
from lora_probe.precision import FLOAT32, rounding
from lora_probe.recording import Floats, ModuleRecord, Trace

SLACK = 1.25
"""How far a factor may be from 1, in units of round-off: B may be rounded, and s·B again, by up to a half each."""
MULTIPLE = 4.0
"""How far G may be from a multiple of the other G, in units of round-off: it contains every value of B twice."""
SUMS = 256 * FLOAT32.round_off
"""The same for the order of the sums in G."""
SAME_FACTOR = 2e-3
"""Factors that are closer than this are one factor."""


@dataclass(frozen=True)
class WeightDifference:
    """Modules whose s·B in the candidate is `factors` (the smallest and the largest) times that of the reference, or
    which have another B (`factors` is None). `meaning` is what the factor is, if it is known. `total` is how many
    modules could be compared."""

    keys: tuple[Key, ...]
    factors: tuple[float, float] | None
    meaning: str
    total: int

    @property
    def text(self) -> str:
        """One clause: `s·B is 2 times that of the reference in all 9 modules (the scaling 2 was applied twice)`."""
        modules = f"{len(self.keys)} of {self.total} modules ({name_modules(map(path_of, self.keys))})"
        where = f"all {self.total} modules" if len(self.keys) == self.total > 1 else modules
        if self.factors is None:
            return f"B is another one in {where}"
        low, high = (f"{factor:.4g}" for factor in self.factors)
        times = f"{low} times" if low == high else f"{low} to {high} times"
        return f"s·B is {times} that of the reference in {where}" + (f" ({self.meaning})" if self.meaning else "")


def weight_differences(reference: Trace, candidate: Trace, dtype: str) -> tuple[WeightDifference, ...]:
    """How the weights differ that two runs of the same file multiply with. No difference means that none is known: G is
    kept at the levels `shrink` and `tensors`."""
    loads = loads_of_both(reference, candidate)
    here, there = (grams_in(trace, load) for trace, load in zip((reference, candidate), loads, strict=True))
    keys = sorted(here.keys() & there.keys(), key=lambda key: natural(key[0]))
    unit = rounding(dtype).round_off
    scaled: list[tuple[Key, float]] = []
    others: list[Key] = []
    for key in keys:
        if (quotient := _quotient(here[key], there[key])) is None:
            continue
        factor, rest = quotient
        if rest > max(MULTIPLE * unit, SUMS):
            others.append(key)
        elif abs(factor - 1) > max(SLACK * unit, SUMS):
            scaled.append((key, factor))
    records = {key: record for (number, key), record in reference.modules.items() if number == loads[0].load}
    multiples = [_difference(members, records, len(keys)) for members in _groups(scaled)]
    return (*multiples, *([WeightDifference(tuple(others), None, "", len(keys))] if others else []))


def _quotient(one: Floats, two: Floats) -> tuple[float, float] | None:
    """f and ‖G₂ − f²·G₁‖ / ‖G₂‖ for the best f ≥ 0; None if G₁ is zero, or one of them is not finite."""
    rank = min(len(one), len(two))
    first, second = (gram[:rank, :rank].astype(np.float64) for gram in (one, two))
    size = float((first * first).sum())
    if not size or not np.isfinite(size) or not np.isfinite(second).all():
        return None
    square = max(float((first * second).sum()) / size, 0.0)
    norm = float(np.linalg.norm(second))
    return math.sqrt(square), float(np.linalg.norm(second - square * first)) / norm if norm else 0.0


def _groups(scaled: list[tuple[Key, float]]) -> Iterator[list[tuple[Key, float]]]:
    """The modules by their factor, in the order of the modules."""
    groups: list[list[tuple[Key, float]]] = []
    for key, factor in scaled:
        for group in groups:
            if abs(factor - group[0][1]) <= SAME_FACTOR * group[0][1]:
                group.append((key, factor))
                break
        else:
            groups.append([(key, factor)])
    yield from groups


def _difference(members: list[tuple[Key, float]], records: dict[Key, ModuleRecord], total: int) -> WeightDifference:
    factors = [factor for _, factor in members]
    meanings = [_meanings(factor, records.get(key)) for key, factor in members]
    common = [meaning for meaning in meanings[0] if all(meaning in others for others in meanings)]
    keys = tuple(key for key, _ in members)
    return WeightDifference(keys, (min(factors), max(factors)), " or ".join(common), total)


def _meanings(factor: float, record: ModuleRecord | None) -> list[str]:
    """What a factor may be for a module with its scaling and its rank."""
    if factor == 0:
        return ["it is zero"]
    if record is None or not record.scaling or not record.rank:
        return []
    scaling, root = abs(record.scaling), math.sqrt(record.rank)
    known = {
        f"the scaling {scaling:.4g} was applied twice": scaling,
        f"the scaling {scaling:.4g} was not applied": 1 / scaling,
        f"√r = {root:.4g}: scaled by alpha/√r instead of alpha/r (rsLoRA)": root,
        f"1/√r = {1 / root:.4g}: scaled by alpha/r instead of alpha/√r (rsLoRA)": 1 / root,
    }
    return [meaning for meaning, value in known.items() if abs(factor - value) <= SAME_FACTOR * value]
