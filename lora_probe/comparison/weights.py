"""Whether two runs multiply with the same weights, and if not, how they differ.

In: the fingerprints of s·B·A in both runs, of which engines record one for each module that runs. Out: a `Relation` for
each module that both runs have, and a `WeightDifference` for the modules that differ in the same way: by a factor, by
running with the weights of another module or of another adapter, or otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from lora_probe.comparison.adapters import counted
from lora_probe.comparison.joined import Joined
from lora_probe.names import Key, name_modules, natural, path_of
from lora_probe.precision import FLOAT32, FLOATS, coarser, factor_text, rounding, same_factor
from lora_probe.recording import Floats, Load, ModuleRecord, Trace
from lora_probe.recording.fingerprint import Fingerprint
from lora_probe.recording.placed import grams_of

SLACK = 2.25
"""How far a factor may be from 1, in units of round-off: B is rounded, and s·B again."""
REST = 8.0
"""How far weights may be from a multiple of the others, in units of round-off: A and B are rounded, by chance in the
same direction, and a fingerprint may be shorter than the weights."""
SUMS = 256 * FLOAT32.round_off
"""The same for the order of the sums in a fingerprint."""
LARGEST = 2**18
"""More outputs than any module has."""
T = TypeVar("T")
Kind = Literal["factor", "module", "adapter", "other"]


@dataclass(frozen=True)
class Loads:
    """The loads of an adapter whose weights are compared: their numbers in both traces."""

    reference: int
    candidate: int


@dataclass(frozen=True)
class Relation:
    """The weights of a module in the candidate, beside those in the reference: the `factor` of the best multiple,
    how far they are from it (`rest`), and from the reference's (`distance`), both relative. `same_a`: A is the same, so
    that x·Aᵀ of both runs can be compared; the same s·B·A may be another pair."""

    factor: float
    rest: float
    distance: float
    same_a: bool = False

    @property
    def same(self) -> bool:
        """Whether s·B·A differs by rounding at most."""
        return self.distance == 0

    def is_multiple(self, limit: float) -> bool:
        return self.rest <= limit


@dataclass(frozen=True)
class WeightDifference:
    """Modules that differ in the same way. `factors` are the smallest and the largest factor, for weights that are a
    multiple of the reference's, and `meaning` is what the factor is, if that is known. `sources` is whose weights the
    modules run with instead of their own: other modules, or the name of another adapter. `distance` is the largest
    ‖ΔW - ΔW'‖ / ‖ΔW'‖. `total` is how many modules could be compared."""

    kind: Kind
    keys: tuple[Key, ...]
    factors: tuple[float, float] | None
    meaning: str
    sources: tuple[str, ...]
    distance: float
    total: int

    @property
    def factor(self) -> float | None:
        """The factor, if all modules have the same."""
        if self.factors is None:
            return None
        low, high = self.factors
        return low if same_factor(low, high) else None

    @property
    def text(self) -> str:
        """One clause: `s·B·A is 1.25 times that of the reference in all 9 modules`, perhaps with its meaning."""
        where = counted(self.keys, self.total)
        if self.kind == "module":
            pairs = zip(self.keys, self.sources, strict=True)
            named = [f"{name_modules([path_of(key)])} runs with the weights of {source}" for key, source in pairs]
            more = f" and {len(named) - 4} more" if len(named) > 4 else ""
            return "; ".join(named[:4]) + more
        if self.kind == "adapter":
            return f"{where} {'runs' if len(self.keys) == 1 else 'run'} with the weights of {self.sources[0]}"
        if self.factors is None:
            return f"s·B·A is another one in {where} (by up to {self.distance:.2g} of its norm)"
        low, high = map(factor_text, self.factors)
        times = f"{low} times" if low == high else f"{low} to {high} times"
        return f"s·B·A is {times} that of the reference in {where}" + (f" ({self.meaning})" if self.meaning else "")


@dataclass(frozen=True)
class Compared:
    """The relation of every module that both runs have, for each pair of loads, and how those that differ do."""

    relations: Mapping[Loads, Mapping[Key, Relation]]
    differences: tuple[WeightDifference, ...]


def compare_weights(
    reference: Trace,
    candidate: Trace,
    pairs: Collection[Loads],
    dtype: str,
    joined: Joined | None,
) -> Compared:
    """How the weights differ that the runs of `pairs` of loads multiply with, by more than rounding to the dtype.
    Values that are so small that they lose digits in it are judged by G, which joined rows have."""
    sides = _Side(reference, reference.fingerprints), _Side(candidate, candidate.fingerprints)

    def lost(loads: Loads, key: Key) -> float:
        grams = _grams(joined, loads, key)
        return _lost_digits(grams, reference.modules.get((loads.reference, key)), dtype)

    return _compared(sides, pairs, limits(dtype), lost)


def compare_files(reference: Trace, candidate: Trace, pairs: Collection[Loads]) -> tuple[WeightDifference, ...]:
    """How the weights differ in the files of `pairs` of loads. What rounds them is the dtype of the files."""
    sides = _Side(reference, reference.file_fingerprints), _Side(candidate, candidate.file_fingerprints)
    loads = {(0, pair.reference) for pair in pairs} | {(1, pair.candidate) for pair in pairs}
    records = [of_trace.trace.modules.items() for of_trace in sides]
    dtypes = {m.dtype for side, items in enumerate(records) for (load, _), m in items if (side, load) in loads}
    return _compared(sides, pairs, limits(coarser(*dtypes.intersection(FLOATS))), lambda *_: 0.0).differences


def _grams(joined: Joined | None, loads: Loads, key: Key) -> list[Floats]:
    """G of a module in both runs, as far as rows have it."""
    if joined is None:
        return []
    sides = (joined.reference, loads.reference), (joined.candidate, loads.candidate)
    held = [grams_of(rows.placed, load, rows.modules.index(key)) for rows, load in sides if key in rows.modules]
    return [weights.gram for weights in held if weights is not None]


def _lost_digits(grams: Sequence[Floats], record: ModuleRecord | None, dtype: str) -> float:
    """How much weights may be off because their values are near the smallest one of the dtype; relative."""
    if not grams or record is None:
        return 0.0
    traces = [float(np.trace(gram.astype(np.float64))) for gram in grams]
    size = math.sqrt(max(min(traces), 0.0)) if all(map(math.isfinite, traces)) else 0.0
    lost = rounding(dtype).smallest * max(1.0, abs(record.scaling or 1.0)) * math.sqrt(LARGEST * len(grams[0]))
    return lost / size if size else 0.0


@dataclass(frozen=True)
class _Side:
    """One of the two traces, with the fingerprints that are compared."""

    trace: Trace
    fingerprints: Mapping[int, Mapping[Key, Fingerprint]]


def _compared(
    sides: tuple[_Side, _Side],
    pairs: Collection[Loads],
    allowed: tuple[float, float],
    lost: Callable[[Loads, Key], float],
) -> Compared:
    """`allowed`: as `limits`; `lost` is what a module may be off in addition."""
    slack, rest = allowed
    relations: dict[Loads, dict[Key, Relation]] = {}
    differing: list[tuple[Key, Relation, Loads]] = []
    for loads in pairs:
        here, there = sides[0].fingerprints.get(loads.reference, {}), sides[1].fingerprints.get(loads.candidate, {})
        for key in sorted(here.keys() & there.keys(), key=lambda key: natural(path_of(key))):
            relation = relate(here[key].product, there[key].product)
            if relation is None:
                continue
            small = lost(loads, key)
            a = relate(here[key].a, there[key].a)
            same_a = a is not None and a.is_multiple(rest + small) and abs(a.factor - 1) <= slack + small
            relation = replace(relation, same_a=same_a)
            if relation.is_multiple(rest + 2 * small) and abs(relation.factor - 1) <= slack + small:
                relation = Relation(1.0, 0.0, 0.0, same_a)
            else:
                differing.append((key, relation, loads))
            relations.setdefault(loads, {})[key] = relation
    origins = _Origins(sides, rest)
    groups: dict[tuple[Kind, object], list[tuple[Key, Relation, str]]] = {}
    for key, relation, loads in differing:
        kind, source = origins.kind_of(key, relation, loads)
        name = _factor_group(groups, relation.factor) if kind == "factor" else source if kind == "adapter" else ""
        groups.setdefault((kind, name), []).append((key, relation, source))
    facts = {key: sides[0].trace.modules.get((loads.reference, key)) for key, _, loads in differing}
    total = len(set().union(*relations.values()))
    differences = [_difference(kind, members, facts, total) for (kind, _), members in groups.items()]
    return Compared(relations, tuple(differences))


def limits(dtype: str) -> tuple[float, float]:
    """How far a factor may be from 1, and weights from a multiple of the others."""
    unit = rounding(dtype).round_off
    return max(SLACK * unit, SUMS), max(REST * unit, SUMS)


def relate(one: Floats, two: Floats) -> Relation | None:
    """The relation of two fingerprints; None if both are zero, or one of them is not finite."""
    first, second = one.astype(np.float64), two.astype(np.float64)
    size, norm = float(first @ first), float(np.linalg.norm(second))
    if not (size or norm) or not math.isfinite(size) or not math.isfinite(norm):
        return None
    factor = float(first @ second) / size if size else 0.0
    rest = float(np.linalg.norm(second - factor * first)) / norm if norm else 0.0
    distance = float(np.linalg.norm(second - first)) / math.sqrt(size) if size else math.inf
    return Relation(factor, rest, distance)


def _factor_group(groups: Iterable[tuple[Kind, object]], factor: float) -> float:
    """The factor under which a module is grouped: the first one that is close."""
    factors = [name for kind, name in groups if kind == "factor" and isinstance(name, float)]
    return next((known for known in factors if same_factor(known, factor)), factor)


class _Origins:
    """Whose weights a module runs with."""

    def __init__(self, sides: tuple[_Side, _Side], limit: float) -> None:
        self._sides, self._limit = sides, limit

    def kind_of(self, key: Key, relation: Relation, loads: Loads) -> tuple[Kind, str]:
        """The kind of a difference, and whose weights they are, if they are somebody's."""
        if relation.is_multiple(self._limit):
            return "factor", ""
        one, two = self._sides
        held = one.fingerprints[loads.reference], two.fingerprints[loads.candidate]
        for own, others, side in ((held[1], held[0], ""), (held[0], held[1], " in the reference")):
            candidates = {name: held.product for name, held in others.items() if name != key}
            if (other := self._same(own[key].product, candidates)) is not None:
                return "module", f"{name_modules([path_of(other)])}{side}"
        elsewhere = dict(self._elsewhere(key, loads))
        for own, side in ((held[1], ""), (held[0], " in the reference")):
            if (name := self._same(own[key].product, elsewhere)) is not None:
                return "adapter", f"{name}{side}"
        return "other", ""

    def _same(self, values: Floats, others: Mapping[T, Floats]) -> T | None:
        """Which of `others` are these weights, up to a positive factor."""
        if not others:
            return None
        table, wanted = np.stack(list(others.values())).astype(np.float64), values.astype(np.float64)
        products, sizes = table @ wanted, np.linalg.norm(table, axis=1) * np.linalg.norm(wanted)
        cosines = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0)
        nearest = int(np.nan_to_num(cosines).argmax())
        near = cosines[nearest] > 0 and 1 - cosines[nearest] ** 2 <= self._limit**2
        return list(others)[nearest] if near else None

    def _elsewhere(self, key: Key, loads: Loads) -> Iterator[tuple[str, Floats]]:
        """The weights at a module in all other loads of both traces."""
        for side, own in zip(self._sides, (loads.reference, loads.candidate), strict=True):
            names = {record.load: record.name for worker in side.trace.workers for record in worker.of(Load)}
            for number, of_load in side.fingerprints.items():
                if key in of_load and number != own and number in names:
                    again = names[number] == names.get(own)
                    name = f"another load of `{names[number]}`" if again else f"adapter `{names[number]}`"
                    yield name, of_load[key].product


def _difference(
    kind: Kind,
    members: Sequence[tuple[Key, Relation, str]],
    facts: Mapping[Key, ModuleRecord | None],
    total: int,
) -> WeightDifference:
    by_key = {key: (relation, source) for key, relation, source in members}
    factors = [relation.factor for relation, _ in by_key.values()]
    keys = tuple(by_key)
    sources = tuple(source for _, source in by_key.values()) if kind in ("module", "adapter") else ()
    bounds = (min(factors), max(factors)) if kind == "factor" else None
    known = [_meanings(relation.factor, facts.get(key)) for key, (relation, _) in by_key.items()]
    common = [meaning for meaning in known[0] if all(meaning in others for others in known)]
    meaning = " or ".join(common) if kind == "factor" else ""
    distance = max(relation.distance for relation, _ in by_key.values())
    return WeightDifference(kind, keys, bounds, meaning, sources, distance, total)


def _meanings(factor: float, record: ModuleRecord | None) -> list[str]:
    """What a factor may be for a module with its scaling and its rank."""
    if factor == 0:
        return ["it is zero"]
    if record is None or not record.scaling or not record.rank or record.rank < 0:
        return ["another sign"] if factor == -1 else []
    scaling, root = abs(record.scaling), math.sqrt(record.rank)
    known = {
        "another sign": -1.0,
        f"the scaling {scaling:.4g} was applied twice, or not in the reference": scaling,
        f"the scaling {scaling:.4g} was not applied, or twice in the reference": 1 / scaling,
        f"√r = {root:.4g}: alpha/√r (rsLoRA) against alpha/r in the reference": root,
        f"1/√r = {1 / root:.4g}: alpha/r against alpha/√r (rsLoRA) in the reference": 1 / root,
    }
    return [meaning for meaning, value in known.items() if same_factor(value, factor)]
