"""Which factor of ΔW explains a merged weight that the factor 1 does not.

In: a measured site. Out: a factor, and what it is called. Rounding to the grid that W lies on is not linear in the
factor, so nothing is read from a least-squares fit: a factor counts only if the replay with it explains the merged
values, the named ones bit for bit, others by a search on ‖merged − replay(f)‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from lora_probe.adapter import AdapterConfig
from lora_probe.files.weights import widen
from lora_probe.ledger import Finding
from lora_probe.merging.rounding import Floats
from lora_probe.merging.scan import FEW, Measured, observed_change, sampled, thinned, under, unexplained
from lora_probe.merging.sites import Site
from lora_probe.rules.lp7_merging import magnitude_ignored, merged_twice, not_merged, subtracted, wrong_scaling

SAME_FACTOR = 3e-4
"""A factor this close to 1 is 1: TF32 products on a GPU have an error of 5e-4 that averages out over a matrix."""
NEAR = 1e-2
"""A factor this close to 1 is only believed where it leaves next to nothing of ENOUGH values unexplained."""
ENOUGH, NEXT_TO_NOTHING = 30, 0.02
EXPLAINS = 0.1
"""A factor explains the change if it leaves less than this share of what the factors 0 and 1 leave (in squares)."""
AS_GOOD = 1.05
"""A shorter number is taken for a factor if it leaves no more than this many times as much."""
UNRELATED = 0.05
"""Below this cosine of the change and ΔW no factor can explain it: chance gives 0.01 on a sample."""
SOME, FIRST = 1 << 14, 3
"""Values of the sample that the search runs on, and the rounding modes that it tries: the others differ by less
than a step of the grid."""
_START = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
_GOLDEN = (math.sqrt(5) - 1) / 2


def named_factor(found: Measured, config: AdapterConfig, known: Sequence[float]) -> tuple[float, Finding] | None:
    """The first of the named factors whose replay explains every value of the sample. `known`: seen at other sites."""
    if found.magnitude is not None and _explains(replace(found, magnitude=None), 1.0, 1):
        return 1.0, magnitude_ignored()
    few = thinned(found, FEW)
    for factor, times, finding in _candidates(found.site, found.raw.rank, config, known):
        for mode in found.modes:
            if _explains(under(few, mode), factor, times) and _explains(under(found, mode), factor, times):
                return factor * times, finding
    return None


def _explains(tried: Measured, factor: float, times: int) -> bool:
    return not unexplained(tried, factor, times).any()


def _candidates(
    site: Site, rank: int, config: AdapterConfig, known: Sequence[float]
) -> Iterator[tuple[float, int, Finding]]:
    """Factor, how many times it goes in, and what that is called. `rank` is that of the tensors."""
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
        (1.0, "no scaling at all"),
        (config.scaling, "the config's without rank_pattern and alpha_pattern"),
        (s * s, "the scaling two times over"),
        *((factor * s, "") for factor in known),
    ):
        if abs(scaling / s - 1) > SAME_FACTOR:
            yield scaling / s, 1, wrong_scaling(scaling, s, name)


def searched_factor(found: Measured, known: Sequence[float]) -> tuple[float, Finding] | None:
    """The factor with the smallest ‖merged − replay(f)‖ over the first rounding modes, or None if it explains too
    little.

    To as many digits as the search can tell; one of `known` is preferred.
    """
    own = found.change.product(found.sample.rows)
    if abs(cosine(observed_change(found), own * np.sign(found.change.scaling))) < UNRELATED:
        return None
    some = thinned(found, SOME)
    tried, factor, least = found, 1.0, math.inf
    for mode in found.modes[:FIRST]:
        candidate = under(some, mode)
        at, error = _minimum(_distance(candidate))
        if error < least:
            tried, factor, least = under(found, mode), at, error
    distance = _distance(tried)
    if not distance(factor) <= EXPLAINS * min(distance(0.0), distance(1.0)):
        return None
    factor = _shortened(factor, found.site.scaling, distance, known)
    if abs(factor - 1) <= SAME_FACTOR or not _believable(tried, factor):
        return None
    return factor, _finding(factor, found)


def _believable(tried: Measured, factor: float) -> bool:
    if abs(factor - 1) > NEAR:
        return True
    left, before = (int(unexplained(tried, f).sum()) for f in (factor, 1.0))
    return before >= ENOUGH and left <= NEXT_TO_NOTHING * before


def _finding(factor: float, found: Measured) -> Finding:
    """What a factor is called that was found by searching, where several roundings hide the exact one."""
    if abs(factor - 2) < NEAR:
        return merged_twice()
    if abs(factor + 1) < NEAR:
        return subtracted()
    if abs(factor) < NEAR:
        return not_merged(found.stored)
    return wrong_scaling(factor * found.site.scaling, found.site.scaling, "")


def _shortened(factor: float, scaling: float, distance: Callable[[float], float], known: Sequence[float]) -> float:
    """A factor seen at another site, or the fewest digits of the scaling, that explain the values as well."""
    limit = AS_GOOD * distance(factor)
    short = [float(f"{factor * scaling:.{digits}g}") / scaling for digits in range(2, 7)]
    near = [one for one in known if abs(one - factor) <= NEAR * abs(factor)]
    return next((one for one in (*near, *short) if distance(one) <= limit), factor)


def cosine(one: Floats, other: Floats) -> float:
    """Of two arrays as vectors; 0 where one of them is zero or not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
        return float(np.vdot(one, other)) / norms if 0 < norms < math.inf else 0.0


def _distance(tried: Measured) -> Callable[[float], float]:
    """‖merged − replay(f)‖² on the sample."""
    merged, merge = widen(tried.sample.raw, tried.stored), sampled(tried)

    def distance(f: float) -> float:
        with np.errstate(invalid="ignore", over="ignore"):
            difference = (merged - widen(merge(f), tried.stored)).reshape(-1)
            return float(np.dot(difference, difference))

    return distance


def _minimum(distance: Callable[[float], float]) -> tuple[float, float]:
    """The minimum of a function that falls towards it from both sides: a grid, then the golden section."""
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
