"""What a measured site means: executed rightly, by which arithmetic, or what went wrong.

In: `Measured` sites, and the others of the adapter that a site may have been mixed up with. Out: `ModuleMerge`s.
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
"""‖merged − replay‖ / ‖ΔW‖ that another arithmetic may leave in float32: TF32 products on a GPU leave 4e-4."""
UNBIASED = 0.02
"""Another arithmetic applies as much of ΔW as PEFT's, within this share."""


LONGER = 2e-3
"""Another arithmetic leaves DoRA's rows as long as they were: its roundings differ from row to row."""


def judge(found: Measured, neighbours: Neighbours, known: Sequence[float] = ()) -> ModuleMerge:
    """The verdict on a site that is changed by s·B·A. `known` are factors seen at other sites."""
    sums, rebased = found.sums, found.site.rebased
    notes = [rebased_base(rebased)] if rebased is not None and found.on_rebased else []
    if sums.not_finite or not math.isfinite(sums.energy):
        by_adapter = not math.isfinite(sums.energy)
        return _module(found, "differs", [not_finite_merge(sums.not_finite, by_adapter), *notes], None)
    if sums.unexplained == 0:
        if rebased is not None and not found.on_rebased and sums.energy > 0:
            return _module(found, "differs", [part_not_taken_out(rebased)], 1.0)
        return _module(found, "verified", notes, 1.0, exact=True)
    if sums.energy > 0:
        if sums.changed == 0:
            return _module(found, "differs", [not_merged(found.stored), *notes], 0.0)
        factor = named_factor(found, neighbours.adapter.config, known) or searched_factor(found, known)
        if factor is not None:
            return _module(found, "differs", [factor[1], *notes], factor[0])
        if _rightly(found):
            return _module(found, "verified", notes, 1.0)
    if (other := neighbours.owner(found)) is not None:
        return _module(found, "differs", [other, *notes], None)
    residual, share, _ = _ratios(sums)
    finding = unexplained_change(share, residual, sums.unexplained, sums.count)
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
        found.mode.name if exact else ("unknown, to the same effect" if right else "unknown"),
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
    """The same effect by an arithmetic that is not known: no value further off than that explains, as much of ΔW in it
    as rounding keeps; in float32, where rounding hides nothing, all of it nearly."""
    sums = found.sums
    if sums.far or abs(sums.applied - sums.kept) > UNBIASED * sums.energy:
        return False
    if found.magnitude is not None and abs(sums.longer) > LONGER * sums.weight:
        return False
    return found.stored != "F32" or found.mode.compute != "F32" or sums.error <= UNKNOWN_ARITHMETIC**2 * sums.energy
