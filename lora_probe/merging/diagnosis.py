"""What a measured site means: merged correctly, by which arithmetic, or what went wrong.

In: `Measured` sites, and the adapter's other sites that they may have been mixed up with. Out: `ModuleMerge`s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lora_probe.ledger import Finding
from lora_probe.merging.factor import named_factor, searched_factor
from lora_probe.merging.neighbours import Neighbours
from lora_probe.merging.report import ModuleMerge, Verdict
from lora_probe.merging.scan import Measured, Sums
from lora_probe.merging.sites import Site
from lora_probe.rules.lp7_merging import (
    not_finite_merge,
    not_merged,
    part_not_taken_out,
    rebased_base,
    replacement_differs,
    unexplained_change,
)

UNKNOWN_ARITHMETIC = 1e-3
"""‖merged − replay‖ / ‖ΔW‖ that an unknown arithmetic may leave in float32: TF32 products on a GPU leave 4e-4."""
UNBIASED = 0.02
"""An unknown arithmetic must apply as much of ΔW as PEFT's does, within this share."""
LONGER = 2e-3
"""An unknown arithmetic must not change the overall length of DoRA's rows by more: its rounding errors cancel out."""


def judge(measured: Measured, neighbours: Neighbours, seen: Sequence[float] = ()) -> ModuleMerge:
    """The verdict on a site that is changed by s·B·A. `seen`: factors found at other sites."""
    sums, rebased = measured.sums, measured.site.rebased
    notes = [rebased_base(rebased)] if rebased is not None and measured.on_rebased else []
    if sums.not_finite or not math.isfinite(sums.energy):
        by_adapter = not math.isfinite(sums.energy)
        return _module(measured, "differs", [not_finite_merge(sums.not_finite, by_adapter), *notes], None)
    if sums.unexplained == 0:
        if rebased is not None and not measured.on_rebased and sums.energy > 0:
            return _module(measured, "differs", [part_not_taken_out(rebased)], 1.0)
        return _module(measured, "verified", notes, 1.0, exact=True)
    if sums.energy > 0:
        if sums.changed == 0:
            return _module(measured, "differs", [not_merged(measured.stored), *notes], 0.0)
        factor = named_factor(measured, neighbours.adapter.config, seen) or searched_factor(measured, seen)
        if factor is not None:
            return _module(measured, "differs", [factor[1], *notes], factor[0])
        if _is_correct(measured):
            return _module(measured, "verified", notes, 1.0)
    if (other := neighbours.owner(measured)) is not None:
        return _module(measured, "differs", [other, *notes], None)
    residual, share, _ = _ratios(sums)
    finding = unexplained_change(share, residual, sums.unexplained, sums.count)
    return _module(measured, "differs", [finding, *notes], None)


def judge_replaced(site: Site, sums: Sums, stored: str) -> ModuleMerge:
    """The verdict on a site whose values the adapter replaces."""
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
    measured: Measured, status: Verdict, findings: Sequence[Finding], factor: float | None, exact: bool = False
) -> ModuleMerge:
    residual, share, kept = _ratios(measured.sums)
    scaling = measured.site.scaling
    correct = status == "verified"
    return ModuleMerge(
        measured.site.key,
        measured.site.label,
        measured.site.tensor,
        status,
        tuple(findings),
        scaling,
        residual,
        share,
        kept,
        None if factor is None else factor * scaling,
        exact,
        measured.mode.name if exact else ("unknown, with the same effect" if correct else "unknown"),
        measured.sums.other if exact else 0,
        measured.sums.energy if math.isfinite(measured.sums.energy) else 0.0,
    )


def _ratios(sums: Sums) -> tuple[float | None, float | None, float | None]:
    """residual, share, effect_kept; None if ΔW is zero or not finite."""
    if not (sums.energy > 0 and math.isfinite(sums.energy)):
        return None, None, None
    residual = math.sqrt(sums.residual / sums.energy) if math.isfinite(sums.residual) else None
    share = sums.applied / sums.energy if math.isfinite(sums.applied) else None
    return residual, share, sums.kept / sums.energy if math.isfinite(sums.kept) else None


def _is_correct(measured: Measured) -> bool:
    """Whether an unknown arithmetic has the same effect: no value is further off than its errors explain, and as much
    of ΔW is there as rounding keeps; in float32, where rounding hides nothing, nearly all of it."""
    sums = measured.sums
    if sums.far or abs(sums.applied - sums.kept) > UNBIASED * sums.energy:
        return False
    if measured.magnitude is not None and abs(sums.longer) > LONGER * sums.weight:
        return False
    return (
        measured.stored != "F32" or measured.mode.compute != "F32" or sums.error <= UNKNOWN_ARITHMETIC**2 * sums.energy
    )
