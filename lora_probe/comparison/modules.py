"""The contribution of each module in both runs, and the parts of the difference.

In: joined rows of two traces, and what is known of the weights and of the engines' own arithmetic. Out: a `ModuleDiff`
for every module: how far its contributions are apart, and which part of that is due to the weights, to rows that ran
without the adapter, to the arithmetic of the engine, and to an input x that was different already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lora_probe.adapter.spectrum import delta_norms
from lora_probe.comparison.joined import Bools, Joined, by_load, distances
from lora_probe.comparison.weights import Loads, Relation
from lora_probe.names import Key
from lora_probe.precision import ROW_SLACK
from lora_probe.recording import Floats, Trace
from lora_probe.recording.placed import grams_of

Status = Literal["ok", "differs", "only in reference", "only in candidate"]


PARTS = ("weights", "routing", "arithmetic", "upstream")
"""The fields of `Parts` that are parts of a difference."""
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that multiply one input."""


@dataclass(frozen=True)
class Parts:
    """The difference of a module's contributions in parts, each relative to the reference's ‖delta‖ as the error is.

    `weights`: the same x through other weights. `routing`: rows that ran with the adapter in one run only.
    `arithmetic`: how far both engines are from s·x·A·B of their own x and of the file's weights, on sampled rows; None
    if an engine did not measure it, or measured wrong weights with it. `upstream`: another x through the same weights.
    A part is None if it cannot be separated from the others. With `exact`, weights, routing and upstream are vectors
    that add up to the difference; what is left is arithmetic.
    """

    weights: float | None
    routing: float
    arithmetic: float | None
    upstream: float | None
    exact: bool

    @property
    def own(self) -> float:
        """What the module itself adds to the difference."""
        return float(np.sqrt((self.weights or 0.0) ** 2 + self.routing**2 + (self.arithmetic or 0.0) ** 2))


@dataclass(frozen=True)
class ModuleDiff:
    """One module in both runs. `error` is ‖Δdelta‖ / ‖delta‖ over all joined rows (each load relative to its own
    ‖delta‖, so that a strong adapter does not hide a weak one); `worst_row` is that of one row. `exact`: Δdelta was
    computed from equal B or from the deltas themselves; otherwise it is a bound from norms. `x_error` is the difference
    of ‖x‖, relative."""

    key: Key
    status: Status
    error: float | None = None
    worst_row: float | None = None
    worst_at: tuple[int, int] | None = None
    exact: bool = True
    strength: tuple[float | None, float | None] = (None, None)
    parts: Parts | None = None
    x_error: float | None = None

    @property
    def module(self) -> str:
        return self.key[0]


def compare_module(
    joined: Joined,
    key: Key,
    allowed: tuple[float, float],
    relations: Mapping[Loads, Mapping[Key, Relation]],
    arithmetic: float | None,
    rounded: float,
) -> tuple[ModuleDiff, Floats]:
    """One module: its error over all rows against a limit, and its worst row against the limit times ROW_SLACK; and the
    error of every row. `allowed` is the limit, and a difference that counts as none.

    The error of a row is relative to its load's usual row at the module, as a single row may be almost zero. It is
    infinite if the row is NaN in one run only, although it ran with the adapter in both; rows that are NaN in both runs
    are left to the ledgers. `rounded` is how far weights may be from each other by rounding.
    """
    one, two = joined.reference, joined.candidate
    here, there = one.modules.index(key), two.modules.index(key)
    norm_one, norm_two = one.delta_norm[joined.reference_rows, here], two.delta_norm[joined.candidate_rows, there]
    of_loads = {loads: of_pair[key] for loads, of_pair in relations.items() if key in of_pair}
    comparable = all(relation.same_a for relation in of_loads.values())
    distance, exact = distances(joined, here, there, comparable)
    if not comparable and not exact:
        # Norms alone would hide another sign, or other weights of the same size.
        apart = max(relation.distance for relation in of_loads.values())
        distance = np.fmin(np.fmax(distance, np.float32(apart) * norm_one), norm_one + norm_two)
    measured = np.isfinite(norm_one) | np.isfinite(norm_two)
    routed = joined.routed_differently & measured
    distance = np.where(routed & ~np.isfinite(distance), np.nan_to_num(np.fmax(norm_one, norm_two)), distance)
    usual = _usual(joined, norm_one)
    upstream, weights, both = _apart(joined, (here, there), of_loads, ~routed, rounded)
    if both is not None and not exact:
        # The shrinks and one G give the whole difference, where the weights are a multiple of the reference's.
        distance = np.where(np.isfinite(both) & measured & ~routed, both, distance)
        exact = not all(relation.same for relation in of_loads.values())
    limit, atol = allowed
    row_errors = np.where(measured & ~(distance <= atol), distance / usual, 0).astype(np.float32)
    row_errors[np.isnan(row_errors)] = np.inf
    error = _root_mean_square(row_errors)
    at = int(row_errors.argmax())
    worst = float(row_errors[at])
    parts = Parts(
        _of(weights, usual, measured) if weights is not None else _of_weights(of_loads),
        _root_mean_square(np.where(routed, row_errors, 0)),
        arithmetic,
        _of(upstream, usual, measured) if upstream is not None else None,
        both is not None,
    )
    strength = (
        _strength(norm_one, one.base_norm[joined.reference_rows, here]),
        _strength(norm_two, two.base_norm[joined.candidate_rows, there]),
    )
    x_error = _x_error(one.x_norm[joined.reference_rows, here], two.x_norm[joined.candidate_rows, there])
    status: Status = "ok" if error <= limit and worst <= ROW_SLACK * limit else "differs"
    where = joined.where[at][:2]
    return ModuleDiff(key, status, error, worst, where, exact, strength, parts, x_error), row_errors


def with_siblings(diffs: Sequence[ModuleDiff], limit: float) -> tuple[ModuleDiff, ...]:
    """The same modules: where other weights hide what is upstream, that of a module with the same input is known, if it
    is rounding."""
    known: dict[tuple[str, int], float] = {}
    for diff in diffs:
        at = _input_of(diff.module)
        if at is not None and diff.parts is not None and diff.parts.upstream is not None:
            known[at] = max(known.get(at, 0.0), diff.parts.upstream)
    filled = []
    for diff in diffs:
        at, parts = _input_of(diff.module), diff.parts
        upstream = known.get(at) if at is not None else None
        if parts is not None and parts.upstream is None and upstream is not None and upstream <= limit:
            parts = replace(parts, upstream=upstream)
        filled.append(replace(diff, parts=parts))
    return tuple(filled)


def _input_of(module: str) -> tuple[str, int] | None:
    """Modules with the same result have the same input."""
    parent, _, name = module.rpartition(".")
    return next(((parent, number) for number, names in enumerate(SAME_INPUT) if name in names), None)


def own_arithmetic(trace: Trace, load: int) -> dict[str, float]:
    """How far an engine's contributions are from s·x·A·B of its own x, by the path of a module, where its slot is as in
    the file."""
    errors: dict[str, float] = {}
    for event in trace.events:
        measured = event.facts.get("errors") if event.stage == "agree" else None
        if not isinstance(measured, dict) or event.facts.get("load", load) != load:
            continue
        for path, values in measured.items():
            first = values[0] if isinstance(values, list) and values else None
            # JSON has no infinity.
            if isinstance(first, int | float):
                errors[path] = float(first)
    return errors


def _usual(joined: Joined, norm: Floats) -> Floats:
    """The root mean square of ‖delta‖ over the rows of each row's load, `[rows]`."""
    usual = np.ones(len(norm), np.float32)
    for _, chosen in by_load(joined):
        total = float(np.sqrt(np.nansum(np.square(norm[chosen], dtype=np.float64))))
        usual[chosen] = total / np.sqrt(max(int(np.isfinite(norm[chosen]).sum()), 1)) or 1.0
    return usual


def _apart(
    joined: Joined,
    columns: tuple[int, int],
    relations: Mapping[Loads, Relation],
    chosen: Bools,
    rounded: float,
) -> tuple[Floats | None, Floats | None, Floats | None]:
    """‖other x through the reference's weights‖, ‖same x through other weights‖ and ‖both together‖ of each row, where
    A is the same and the candidate's weights are a multiple of the reference's; None if they are not, or are not
    known."""
    one, two = joined.reference, joined.candidate
    if one.shrink is None or two.shrink is None:
        return None, None, None
    rank = min(one.shrink.shape[-1], two.shrink.shape[-1])
    upstream, weights, both = (np.zeros(len(chosen), np.float32) for _ in range(3))
    for (load_one, load_two), of_loads in by_load(joined):
        if min(load_one, load_two) < 0:
            continue
        relation = relations.get(Loads(load_one, load_two))
        held = grams_of(one.placed, load_one, columns[0])
        if held is None or relation is None or not relation.same_a or relation.rest > rounded:
            return None, None, None
        rows, gram = of_loads & chosen, held.gram[:rank, :rank]
        before = one.shrink[joined.reference_rows, columns[0], :rank][rows]
        after = two.shrink[joined.candidate_rows, columns[1], :rank][rows]
        factor = np.float32(relation.factor)
        upstream[rows] = delta_norms(after - before, gram)
        weights[rows] = abs(factor - 1) * delta_norms(after, gram)
        both[rows] = delta_norms(factor * after - before, gram)
    return upstream, weights, both


def _of_weights(relations: Mapping[Loads, Relation]) -> float | None:
    """The part of other weights, for an x in any direction."""
    return max((relation.distance for relation in relations.values()), default=None)


def _of(values: Floats, usual: Floats, measured: Bools) -> float:
    return _root_mean_square(np.where(measured & np.isfinite(values), values / usual, 0))


def _root_mean_square(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if len(values) else 0.0


def _strength(delta: Floats, base: Floats) -> float | None:
    """sqrt(Σ‖delta‖²) / sqrt(Σ‖base‖²)."""
    below = float(np.sqrt(np.nansum(np.square(base, dtype=np.float64))))
    return float(np.sqrt(np.nansum(np.square(delta, dtype=np.float64)))) / below if below else None


def _x_error(one: Floats, two: Floats) -> float | None:
    """The root mean square of |‖x'‖ - ‖x‖| over that of ‖x‖."""
    both = np.isfinite(one) & np.isfinite(two)
    if not both.any():
        return None
    size = _root_mean_square(one[both])
    return _root_mean_square(two[both] - one[both]) / size if size else None
