"""What a measured site means: executed rightly, by which arithmetic, or what went wrong.

In: `Measured` sites, and the others of the adapter that a site may have been mixed up with. Out: `ModuleMerge`s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.checkpoint import Checkpoint
from lora_probe.ledger import Finding
from lora_probe.merging.change import change_of
from lora_probe.merging.factor import SAME_FACTOR, cosine, named_factor, searched_factor
from lora_probe.merging.report import ModuleMerge, Verdict
from lora_probe.merging.scan import FEW, Measured, Sums, observed_change, thinned
from lora_probe.merging.sites import Site
from lora_probe.rules.merging import (
    another_module,
    not_finite_merge,
    not_merged,
    rebased_base,
    replacement_differs,
    transposed_change,
    unexplained_change,
    wrong_scaling,
)
from lora_probe.weights import widen

UNKNOWN_ARITHMETIC = 4e-3
"""‖merged − replay‖ / ‖ΔW‖ that another arithmetic may leave: a product of bfloat16 factors leaves 3e-3."""
ALIKE = 0.7
"""Cosine from which a change is called another module's: unrelated changes of 10^5 values stay below 0.02."""


@dataclass(frozen=True)
class Neighbours:
    """The other sites that might have been mixed up with one: same shape, same kind."""

    sites: Sequence[Site]
    base: Checkpoint
    adapter: Adapter


def judge(found: Measured, neighbours: Neighbours, known: Sequence[float] = ()) -> ModuleMerge:
    """The verdict on a site that is changed by s·B·A. `known` are factors seen at other sites."""
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
        exact = named_factor(found, neighbours.adapter.config, known)
        if exact is not None:
            return _module(found, "differs", [exact[1], *notes], exact[0])
        factor = searched_factor(found)
        if factor is not None and abs(factor - 1) > SAME_FACTOR:
            return _module(
                found, "differs", [wrong_scaling(factor * found.site.scaling, found.site.scaling, ""), *notes], factor
            )
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


def _another(found: Measured, neighbours: Neighbours) -> Finding | None:
    """Whose change or whose weight it is, if it is another module's of the same shape, or its own transposed."""
    few = thinned(found, FEW)
    rows, own = few.sample.rows, few.change
    merged, observed = widen(few.sample.raw, found.stored), observed_change(few)
    shape = own.left.shape[0], own.right.shape[1]
    if shape[0] == shape[1] and abs(cosine(observed, own.right[:, rows].T @ own.left.T)) > ALIKE:
        return transposed_change()
    weight_is_own = cosine(merged, few.sample.w) > ALIKE
    for site in neighbours.sites:
        if site.label == found.site.label or site.stop - site.start != shape[0]:
            continue
        change = change_of(site, neighbours.adapter)
        if (change.left.shape[0], change.right.shape[1]) != shape:
            continue
        if cosine(observed, change.left[rows] @ change.right) > ALIKE:
            return another_module("change", site.label)
        if weight_is_own:
            continue
        tensor = neighbours.base.tensors[site.tensor]
        places = [site.start + int(row) for row in rows]
        weight = np.concatenate([widen(tensor.rows(row, row + 1), tensor.dtype) for row in places])
        if cosine(merged, weight) > ALIKE:
            return another_module("weight", site.label)
    return None
