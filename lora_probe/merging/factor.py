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

from lora_probe.config import AdapterConfig
from lora_probe.ledger import Finding
from lora_probe.merging.replay import Order
from lora_probe.merging.scan import FEW, Measured, observed_change, sampled, thinned, unexplained
from lora_probe.merging.sites import Site
from lora_probe.rounding import Floats
from lora_probe.rules.merging import merged_twice, subtracted, wrong_scaling
from lora_probe.weights import widen

SAME_FACTOR = 3e-4
"""A factor this close to 1 is 1: TF32 products on a GPU have an error of 5e-4 that averages out over a matrix."""
EXPLAINS = 0.1
"""A factor explains the change if it leaves less than this share of what the factors 0 and 1 leave (in squares)."""
UNRELATED = 0.05
"""Below this cosine of the change and ΔW no factor can explain it: chance gives 0.01 on a sample."""
SOME = 1 << 15
"""Values of the sample that the search runs on."""
_START = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
_GOLDEN = (math.sqrt(5) - 1) / 2


def named_factor(found: Measured, config: AdapterConfig, known: Sequence[float]) -> tuple[float, Finding] | None:
    """The first of the named factors whose replay explains every value of the sample. `known`: seen at other sites."""
    few = thinned(found, FEW)
    for factor, times, finding in _candidates(found.site, found.raw.left.shape[1], config, known):
        for order in found.orders:
            if unexplained(_under(few, order), factor, times).any():
                continue
            if not unexplained(_under(found, order), factor, times).any():
                return factor * times, finding
    return None


def _under(found: Measured, order: Order) -> Measured:
    """The same site with another order of rounding."""
    return replace(found, order=order, change=found.raw.rounded(order.factors))


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
    for scaling, name in (
        (s / 2, "half of it"),
        (alpha, f"alpha instead of {right}"),
        (
            alpha / (rank if config.rslora else root),
            f"alpha / {'r' if config.rslora else 'sqrt(r)'} instead of {right}",
        ),
        (1.0, "no scaling at all"),
        (config.scaling, "the config's without rank_pattern and alpha_pattern"),
        (s * s, "the scaling two times over"),
        *((factor * s, "") for factor in known),
    ):
        if abs(scaling / s - 1) > SAME_FACTOR:
            yield scaling / s, 1, wrong_scaling(scaling, s, name)


def searched_factor(found: Measured) -> float | None:
    """The factor with the smallest ‖merged − replay(f)‖ over all known orders, or None if it explains too little.

    To six digits of the scaling, which is what the search can tell.
    """
    if abs(_cosine_with_own(found)) < UNRELATED:
        return None
    some = thinned(found, SOME)
    best: tuple[float, Order] | None = None
    least = math.inf
    for order in found.orders:
        factor, error = _minimum(_distance(_under(some, order)))
        if error < least:
            best, least = (factor, order), error
    if best is None:
        return None
    whole = _distance(_under(found, best[1]))
    if not whole(best[0]) <= EXPLAINS * min(whole(0.0), whole(1.0)):
        return None
    return float(f"{best[0] * found.site.scaling:.6g}") / found.site.scaling


def _cosine_with_own(found: Measured) -> float:
    own = found.change.left[found.sample.rows] @ found.change.right
    return cosine(observed_change(found), own)


def cosine(one: Floats, other: Floats) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms > 0 else 0.0


def _distance(tried: Measured) -> Callable[[float], float]:
    """‖merged − replay(f)‖² on the sample."""
    merged = widen(tried.sample.raw, tried.stored)

    def distance(f: float) -> float:
        difference = (merged - widen(sampled(tried, f), tried.stored)).reshape(-1)
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
