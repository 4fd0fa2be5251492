"""What a measured site means: executed rightly, by which arithmetic, or what went wrong.

In: `Measured` sites. Out: `ModuleMerge`s. Rounding to the grid that W lies on is not linear in the scaling, so a wrong
scaling is never read from a least-squares fit: a factor f counts only if the replay with f explains the merged values
(the named factors bit for bit, others by a search on ‖merged − replay(f)‖).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.checkpoint import Checkpoint
from lora_probe.ledger import Finding
from lora_probe.merging.change import change_of
from lora_probe.merging.replay import Order
from lora_probe.merging.report import ModuleMerge, Verdict
from lora_probe.merging.scan import Measured, Sums, sampled, unexplained
from lora_probe.merging.sites import Site
from lora_probe.rounding import Floats, through
from lora_probe.rules.merging import (
    another_module,
    merged_twice,
    not_finite_merge,
    not_merged,
    rebased_base,
    replacement_differs,
    subtracted,
    transposed_change,
    unexplained_change,
    wrong_scaling,
)
from lora_probe.weights import widen

SAME_FACTOR = 3e-4
"""A factor this close to 1 is 1: TF32 products on a GPU have an error of 5e-4 that averages out over a matrix."""
UNKNOWN_ARITHMETIC = 4e-3
"""‖merged − replay‖ / ‖ΔW‖ that another arithmetic may leave: a product of bfloat16 factors leaves 3e-3."""
EXPLAINS = 0.1
"""A factor explains the change if it leaves less than this share of what the factors 0 and 1 leave (in squares)."""
ALIKE = 0.7
"""Cosine from which a change is called another module's: unrelated changes of 10^5 values stay below 0.02."""
_START = (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 4.0)
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Neighbours:
    """The other sites that might have been mixed up with one: same shape, same kind."""

    sites: Sequence[Site]
    base: Checkpoint
    adapter: Adapter


def judge(found: Measured, neighbours: Neighbours, rank: int, known: Sequence[float] = ()) -> ModuleMerge:
    """The verdict on a site that is changed by s·B·A. `known` are factors seen at other sites: they are tried first."""
    sums, notes = found.sums, []
    if found.on_rebased:
        notes.append(rebased_base(str(found.site.rebased)))
    if sums.not_finite or not math.isfinite(sums.energy):
        by_adapter = not math.isfinite(sums.energy)
        return _module(found, "differs", [not_finite_merge(sums.not_finite, by_adapter), *notes], None)
    if sums.unexplained == 0:
        return _module(found, "verified", notes, 1.0, exact=True)
    if sums.changed == 0 and sums.energy > 0:
        return _module(found, "differs", [not_merged(found.stored), *notes], 0.0)
    if sums.energy > 0:
        exact = _named(found, rank, known)
        if exact is not None:
            return _module(found, "differs", [exact[1], *notes], exact[0])
        factor = _search(found)
        if factor is not None and abs(factor - 1) > SAME_FACTOR:
            return _module(found, "differs", [_scaled(found, factor, ""), *notes], factor)
        if _rightly(found):
            return _module(found, "verified", notes, 1.0)
        if (other := _another(found, neighbours)) is not None:
            return _module(found, "differs", [other, *notes], None)
    finding = unexplained_change(*_ratios(sums)[:2][::-1], sums.unexplained, sums.count)
    return _module(found, "differs", [finding, *notes], None)


def judge_replaced(site: Site, sums: Sums, stored: str) -> ModuleMerge:
    """The verdict on a site whose values the adapter carries whole."""
    residual, share, kept = _ratios(sums)
    findings = []
    if sums.not_finite:
        findings.append(not_finite_merge(sums.not_finite, not math.isfinite(sums.energy)))
    elif sums.other:
        findings.append(replacement_differs(sums.other, sums.count, sums.changed == 0))
    exact = not findings
    return ModuleMerge(
        site.key,
        site.label,
        site.tensor,
        "verified" if exact else "differs",
        tuple(findings),
        None,
        residual,
        share,
        kept,
        None,
        exact,
        f"the adapter's values in {stored}" if exact else "unknown",
        energy=sums.energy,
    )


def _module(
    found: Measured, status: Verdict, findings: Sequence[Finding], factor: float | None, exact: bool = False
) -> ModuleMerge:
    residual, share, kept = _ratios(found.sums)
    scaling = found.site.scaling
    right = status == "verified"
    return ModuleMerge(
        found.site.key,
        found.site.label,
        found.site.tensor,
        status,
        tuple(findings),
        scaling,
        residual,
        share,
        kept,
        None if factor is None else factor * scaling,
        exact,
        found.order.name if exact else ("unknown, to the same effect" if right else "unknown"),
        found.sums.other if exact else 0,
        found.sums.energy if math.isfinite(found.sums.energy) else 0.0,
    )


def _ratios(sums: Sums) -> tuple[float | None, float | None, float | None]:
    """residual, share, effect_kept; None where ΔW is zero or not finite."""
    if not (sums.energy > 0 and math.isfinite(sums.energy)):
        return None, None, None
    residual = math.sqrt(sums.residual / sums.energy) if math.isfinite(sums.residual) else None
    share = sums.applied / sums.energy if math.isfinite(sums.applied) else None
    return residual, share, sums.kept / sums.energy if math.isfinite(sums.kept) else None


def _rightly(found: Measured) -> bool:
    """The same effect by an arithmetic that is not known: near enough everywhere, and as much of it as rounding keeps.

    Every value within a step of the grid will do. Where they are not, the distance to the replay decides, unless all
    but a few values follow a known order: then those few come from elsewhere (or from the last bits of a base that was
    computed here).
    """
    sums = found.sums
    if sums.far == 0:
        return abs(sums.applied - sums.kept) <= 0.05 * sums.energy
    return (not found.explained or found.on_rebased) and sums.error <= UNKNOWN_ARITHMETIC**2 * sums.energy


def _named(found: Measured, rank: int, known: Sequence[float]) -> tuple[float, Finding] | None:
    """The first of the named factors whose replay explains every value of the sample."""
    for factor, times, finding in _candidates(found.site, rank, known):
        for order in found.orders:
            tried = _under(found, order)
            if not unexplained(tried, factor, times).any():
                return factor * times, finding
    return None


def _under(found: Measured, order: Order) -> Measured:
    """The same site with another order of rounding."""
    return replace(found, order=order, change=found.raw.rounded(order.factors))


def _candidates(site: Site, rank: int, known: Sequence[float]) -> Iterator[tuple[float, int, Finding]]:
    """Factor, how many times it goes in, and what that is called. `rank` is that of the tensors."""
    s = site.scaling
    alpha = s * rank
    yield 1.0, 2, merged_twice()
    for factor, name in (
        (2.0, "twice"),
        (0.5, "half"),
        (-1.0, "subtracted"),
        (alpha / s, "alpha instead of alpha / r"),
        (1 / s, "1: no scaling at all"),
        (math.sqrt(rank), "alpha / sqrt(r) instead of alpha / r"),
        (1 / math.sqrt(rank), "alpha / r instead of alpha / sqrt(r)"),
        (s, "the scaling two times over"),
        *((one, "") for one in known),
    ):
        if name == "twice":
            yield factor, 1, merged_twice()
        elif name == "subtracted":
            yield factor, 1, subtracted()
        elif abs(factor - 1) > SAME_FACTOR:
            yield factor, 1, wrong_scaling(factor * s, s, name)


def _scaled(found: Measured, factor: float, name: str) -> Finding:
    return wrong_scaling(factor * found.site.scaling, found.site.scaling, name)


def _search(found: Measured) -> float | None:
    """The factor with the smallest ‖merged − replay(f)‖ over all known orders, or None if it explains too little."""
    best: tuple[float, float, float] | None = None
    for order in found.orders:
        tried = _under(found, order)
        merged = widen(found.sample.raw, found.stored)

        def distance(f: float, tried: Measured = tried, merged: Floats = merged) -> float:
            difference = merged - widen(sampled(tried, f), found.stored)
            return float(np.dot(difference.reshape(-1), difference.reshape(-1)))

        factor, error = _minimum(distance)
        if best is None or error < best[1]:
            best = factor, error, min(distance(0.0), distance(1.0))
    if best is None or not best[1] <= EXPLAINS * best[2]:
        return None
    return _short(best[0] * found.site.scaling) / found.site.scaling


def _minimum(distance: Callable[[float], float]) -> tuple[float, float]:
    """The minimum of a function that falls towards it from both sides: a grid, then the golden section."""
    values = [distance(f) for f in _START]
    at = int(np.argmin(values))
    low = _START[max(at - 1, 0)] if at else _START[0] * 4
    high = _START[min(at + 1, len(_START) - 1)] if at + 1 < len(_START) else _START[-1] * 64
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


def _short(value: float) -> float:
    """To the digits that the search can tell."""
    return float(f"{value:.6g}")


def _another(found: Measured, neighbours: Neighbours) -> Finding | None:
    """Whose change or whose weight it is, if it is another module's of the same shape."""
    sample, compute = found.sample, found.order.compute
    merged = widen(sample.raw, found.stored)
    observed = merged - through(sample.w, compute)
    own_change = found.change
    if own_change.left.shape[0] == own_change.right.shape[1]:
        turned = own_change.right[:, sample.rows].T @ own_change.left.T
        if abs(_cosine(observed, turned)) > ALIKE:
            return transposed_change()
    for site in neighbours.sites:
        if site.label == found.site.label or (site.stop - site.start) != (found.site.stop - found.site.start):
            continue
        change = change_of(site, neighbours.adapter)
        if (change.left.shape[0], change.right.shape[1]) != (found.change.left.shape[0], found.change.right.shape[1]):
            continue
        delta = change.left[sample.rows] @ change.right
        if _cosine(observed, delta * np.float32(change.scaling)) > ALIKE:
            return another_module("change", site.label)
        tensor = neighbours.base.tensors[site.tensor]
        rows = site.start + sample.rows
        weight = np.concatenate(
            [widen(tensor.rows(row, row + 1), tensor.dtype) for row in rows[:: max(1, len(rows) // 16)]]
        )
        mine = merged[:: max(1, len(rows) // 16)]
        own = sample.w[:: max(1, len(rows) // 16)]
        if _cosine(mine, weight) > ALIKE > _cosine(mine, own):
            return another_module("weight", site.label)
    return None


def _cosine(one: Floats, other: Floats) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms > 0 else 0.0
