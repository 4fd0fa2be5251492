"""Whether two runs of the same adapter multiply with the same s·B, and by which factor they differ.

In: joined rows of two traces, and the dtype that decides. Out: a `WeightDifference` for the modules whose s·B is a
multiple of the reference's, and one for those that have another B. It follows from G = (s·B)ᵀ(s·B), which engines
record of the weights that they run with: rounding changes single values of B, and hardly their sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_probe.comparison.adapters import counted
from lora_probe.comparison.joined import Joined, by_load
from lora_probe.names import Key, natural
from lora_probe.precision import FLOAT32, factor_text, rounding
from lora_probe.recording import Floats, ModuleRecord
from lora_probe.recording.placed import grams_of

SLACK = 2.25
"""How far a factor may be from 1, in units of round-off: B is rounded, and s·B again."""
MULTIPLE = 5.0
"""How far G may be from a multiple of the other G, in units of round-off: it contains every value of B twice."""
SUMS = 256 * FLOAT32.round_off
"""The same for the order of the sums in G."""
LARGEST = 2**18
"""More outputs than any module has."""
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
        """One clause: `s·B is 1.25 times that of the reference in all 9 modules`, perhaps with its meaning."""
        where = counted(self.keys, self.total)
        if self.factors is None:
            return f"B is another one in {where}"
        low, high = map(factor_text, self.factors)
        times = f"{low} times" if low == high else f"{low} to {high} times"
        return f"s·B is {times} that of the reference in {where}" + (f" ({self.meaning})" if self.meaning else "")


@dataclass(frozen=True)
class _Multiple:
    """A module whose s·B is `factor` times that of the reference."""

    key: Key
    factor: float
    record: ModuleRecord


def weight_differences(
    joined: Joined, modules: Mapping[tuple[int, Key], ModuleRecord], dtype: str, rtol: float | None = None
) -> tuple[WeightDifference, ...]:
    """How the weights differ that rows of two runs of the same file were multiplied with. No difference means that none
    is known: G is kept at the levels `shrink` and `tensors`. `modules` are those of the reference; `rtol` replaces the
    tolerance of the dtype."""
    scaled: dict[Key, _Multiple] = {}
    others: set[Key] = set()
    compared: set[Key] = set()
    columns = {key: number for number, key in enumerate(joined.candidate.modules)}
    for (one, two), _ in by_load(joined):
        for number, key in enumerate(joined.reference.modules):
            record = modules.get((one, key))
            if record is None or key not in columns:
                continue
            here, there = (
                grams_of(joined.reference.placed, one, number),
                grams_of(joined.candidate.placed, two, columns[key]),
            )
            if here is None or there is None or (quotient := _quotient(here.gram, there.gram)) is None:
                continue
            compared.add(key)
            factor, rest = quotient
            slack, multiple = _limits(here.gram, there.gram, record, dtype)
            if rest > (multiple if rtol is None else rtol):
                others.add(key)
            elif abs(factor - 1) > (slack if rtol is None else rtol):
                scaled[key] = _Multiple(key, factor, record)
    groups = _groups(sorted(scaled.values(), key=lambda module: natural(module.key[0])))
    multiples = tuple(_difference(group, len(compared)) for group in groups)
    unlike = tuple(sorted(others, key=lambda key: natural(key[0])))
    return (*multiples, WeightDifference(unlike, None, "", len(compared))) if others else multiples


def _limits(one: Floats, two: Floats, record: ModuleRecord, dtype: str) -> tuple[float, float]:
    """How far a factor may be from 1, and G from a multiple of the other: by the round-off of the dtype, and for values
    so small that they lose digits by its smallest value."""
    unit = rounding(dtype).round_off
    size = math.sqrt(min(float(np.trace(gram.astype(np.float64))) for gram in (one, two)))
    values = LARGEST * (record.rank or len(one))
    lost = rounding(dtype).smallest * max(1.0, abs(record.scaling or 1.0)) * math.sqrt(values)
    small = lost / size if size else 0.0
    return max(SLACK * unit, SUMS) + small, max(MULTIPLE * unit, SUMS) + 2 * small


def _quotient(one: Floats, two: Floats) -> tuple[float, float] | None:
    """f and ‖G₂ − f²·G₁‖ / ‖G₂‖ for the best f ≥ 0; None if both are zero, or one of them is not finite."""
    rank = min(len(one), len(two))
    first, second = (gram[:rank, :rank].astype(np.float64) for gram in (one, two))
    size = float((first * first).sum())
    norm = float(np.linalg.norm(second))
    if not (size or norm) or not np.isfinite(size) or not np.isfinite(norm):
        return None
    square = max(float((first * second).sum()) / size, 0.0) if size else 0.0
    return math.sqrt(square), float(np.linalg.norm(second - square * first)) / norm if norm else 0.0


def _groups(scaled: Iterable[_Multiple]) -> list[list[_Multiple]]:
    """The modules by their factor, in the order of the modules."""
    groups: list[list[_Multiple]] = []
    for module in scaled:
        first = (group for group in groups if abs(module.factor - group[0].factor) <= SAME_FACTOR * group[0].factor)
        if (group := next(first, None)) is None:
            groups.append([module])
        else:
            group.append(module)
    return groups


def _difference(group: Sequence[_Multiple], total: int) -> WeightDifference:
    factors = [module.factor for module in group]
    meanings = [_meanings(module) for module in group]
    common = [meaning for meaning in meanings[0] if all(meaning in others for others in meanings)]
    keys = tuple(module.key for module in group)
    return WeightDifference(keys, (min(factors), max(factors)), " or ".join(common), total)


def _meanings(module: _Multiple) -> list[str]:
    """What a factor may be for a module with its scaling and its rank."""
    factor, record = module.factor, module.record
    if factor == 0:
        return ["it is zero"]
    if not record.scaling or not record.rank:
        return []
    scaling, root = abs(record.scaling), math.sqrt(record.rank)
    known = {
        f"the scaling {scaling:.4g} was applied twice, or not in the reference": scaling,
        f"the scaling {scaling:.4g} was not applied, or twice in the reference": 1 / scaling,
        f"√r = {root:.4g}: alpha/√r (rsLoRA) against alpha/r in the reference": root,
        f"1/√r = {1 / root:.4g}: alpha/r against alpha/√r (rsLoRA) in the reference": 1 / root,
    }
    return [meaning for meaning, value in known.items() if abs(factor - value) <= SAME_FACTOR * value]
