"""Which factor of ΔW explains a merged weight that the factor 1 does not.

In: a measured site. Out: a factor, and its name. Rounding to W's grid is not linear in the factor, so a least-squares
fit proves nothing: a factor counts only if the replay with it explains the merged values. Named factors must explain
them bit for bit; others are found by a search on ‖merged − replay(f)‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_probe.adapter import AdapterConfig
from lora_probe.files.values import widen
from lora_probe.ledger import Finding
from lora_probe.merging.rounding import Floats
from lora_probe.merging.scan import FEW, Measured, observed_change, sampled, thinned, under, unexplained
from lora_probe.merging.sites import Site
from lora_probe.rules.lp7_merging import magnitude_ignored, merged_twice, not_merged, subtracted, wrong_scaling

SAME_FACTOR = 3e-4
"""A factor this close to 1 counts as 1: TF32 products on a GPU have errors of 5e-4 that average out over a matrix."""
NEAR = 1e-2
"""A factor this close to 1 is accepted only if it leaves NEXT_TO_NOTHING of at least ENOUGH values unexplained."""
ENOUGH, NEXT_TO_NOTHING = 30, 0.02
EXPLAINS = 0.1
"""A factor explains the change if it leaves less than this share of what the factors 0 and 1 leave (squared)."""
AS_GOOD = 1.05
"""A rounder factor is preferred if it leaves at most this many times as much."""
UNRELATED = 0.05
"""Below this cosine of the change and ΔW no factor can explain it: chance gives 0.01 on a sample."""
SOME, FIRST = 1 << 14, 3
"""How many values of the sample the search uses, and how many rounding modes it tries: the others differ by less
than a step of the grid."""
_START = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
_GOLDEN = (math.sqrt(5) - 1) / 2


def named_factor(measured: Measured, config: AdapterConfig, seen: Sequence[float]) -> tuple[float, Finding] | None:
    """The first named factor whose replay explains every value of the sample. `seen`: factors found at other sites."""
    if measured.magnitude is not None and _explains(replace(measured, magnitude=None), 1.0, 1):
        return 1.0, magnitude_ignored()
    few = thinned(measured, FEW)
    for factor, times, finding in _candidates(measured.site, measured.raw.rank, config, seen):
        for mode in measured.modes:
            if _explains(under(few, mode), factor, times) and _explains(under(measured, mode), factor, times):
                return factor * times, finding
    return None


def _explains(tried: Measured, factor: float, times: int) -> bool:
    return not unexplained(tried, factor, times).any()


def _candidates(
    site: Site, rank: int, config: AdapterConfig, seen: Sequence[float]
) -> Iterator[tuple[float, int, Finding]]:
    """Each factor, how many times the change is added, and the finding. `rank` is the rank of the tensors."""
    s = site.scaling
    yield 1.0, 2, merged_twice()
    yield 2.0, 1, merged_twice()
    yield -1.0, 1, subtracted()
    root = math.sqrt(rank)
    right, alpha = ("alpha / sqrt(r)", s * root) if config.rslora else ("alpha / r", s * rank)
    other = "alpha / r" if config.rslora else "alpha / sqrt(r)"
    for scaling, name in (
        (s / 2, "half of it"),
        (alpha, f"alpha instead of {right}"),
        (alpha / (rank if config.rslora else root), f"{other} instead of {right}"),
        (1.0, "no scaling"),
        (config.scaling, "the config's scaling without rank_pattern and alpha_pattern"),
        (s * s, "the scaling applied twice"),
        *((factor * s, "") for factor in seen),
    ):
        if abs(scaling / s - 1) > SAME_FACTOR:
            yield scaling / s, 1, wrong_scaling(scaling, s, name)


def searched_factor(measured: Measured, seen: Sequence[float]) -> tuple[float, Finding] | None:
    """The factor with the smallest ‖merged − replay(f)‖ over the first rounding modes; None if it explains too
    little.

    It has as many digits as the search can resolve; a factor in `seen` is preferred.
    """
    own = measured.change.product(measured.sample.rows)
    if abs(cosine(observed_change(measured), own * np.sign(measured.change.scaling))) < UNRELATED:
        return None
    some = thinned(measured, SOME)
    tried, factor, least = measured, 1.0, math.inf
    for mode in measured.modes[:FIRST]:
        candidate = under(some, mode)
        at, error = _minimum(_distance(candidate))
        if error < least:
            tried, factor, least = under(measured, mode), at, error
    distance = _distance(tried)
    if not distance(factor) <= EXPLAINS * min(distance(0.0), distance(1.0)):
        return None
    factor = _shortened(factor, measured.site.scaling, distance, seen)
    if abs(factor - 1) <= SAME_FACTOR or not _believable(tried, factor):
        return None
    return factor, _finding(factor, measured)


def _believable(tried: Measured, factor: float) -> bool:
    if abs(factor - 1) > NEAR:
        return True
    left, before = (int(unexplained(tried, f).sum()) for f in (factor, 1.0))
    return before >= ENOUGH and left <= NEXT_TO_NOTHING * before


def _finding(factor: float, measured: Measured) -> Finding:
    """The finding for a factor from the search, where rounding hides the exact factor."""
    if abs(factor - 2) < NEAR:
        return merged_twice()
    if abs(factor + 1) < NEAR:
        return subtracted()
    if abs(factor) < NEAR:
        return not_merged(measured.stored)
    return wrong_scaling(factor * measured.site.scaling, measured.site.scaling, "")


def _shortened(factor: float, scaling: float, distance: Callable[[float], float], seen: Sequence[float]) -> float:
    """A factor seen at another site, or else the scaling with the fewest digits, that explains the values as well."""
    limit = AS_GOOD * distance(factor)
    short = [float(f"{factor * scaling:.{digits}g}") / scaling for digits in range(2, 7)]
    near = [candidate for candidate in seen if abs(candidate - factor) <= NEAR * abs(factor)]
    return next((candidate for candidate in (*near, *short) if distance(candidate) <= limit), factor)


def cosine(left: Floats, right: Floats) -> float:
    """The cosine of two arrays as vectors; 0 if one of them is zero or not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
        return float(np.vdot(left, right)) / norms if 0 < norms < math.inf else 0.0


def _distance(tried: Measured) -> Callable[[float], float]:
    """The function ‖merged − replay(f)‖² of f, on the sample."""
    merged, merge = widen(tried.sample.raw, tried.stored), sampled(tried)

    def distance(f: float) -> float:
        with np.errstate(invalid="ignore", over="ignore"):
            difference = (merged - widen(merge(f), tried.stored)).reshape(-1)
            return float(np.dot(difference, difference))

    return distance


def _minimum(distance: Callable[[float], float]) -> tuple[float, float]:
    """The minimum of a function that falls towards it from both sides: a grid, then golden-section search."""
    values = [distance(f) for f in _START]
    at = int(np.argmin(values))
    low = _START[at - 1] if at else _START[0] * 4
    high = _START[at + 1] if at + 1 < len(_START) else _START[-1] * 64
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = distance(left), distance(right)
    while high - low > 1e-7 * max(1.0, abs(high)):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = distance(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = distance(right)
    factor = (low + high) / 2
    error = distance(factor)
    return (factor, error) if error <= values[at] else (_START[at], values[at])
