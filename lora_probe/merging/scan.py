"""One site of a merge, measured: every value is compared with that of PEFT's merge.

In: a site, base, merged model and adapter. Out: `Sums` over all of the site's values under the rounding mode that
explains a sample of them best, and a `Sample` for the diagnosis. Only blocks of rows are in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import Adapter
from lora_probe.base import Checkpoint, StoredTensor
from lora_probe.files.values import Raw, widen
from lora_probe.merging.change import Change, Indices, Origin, change_of, origin_of, rebased, values_of
from lora_probe.merging.replay import Magnitude, RoundingMode, magnitude, possible, replay, rounding_modes
from lora_probe.merging.rounding import Floats, narrow, spacing, through
from lora_probe.merging.sites import Site
from lora_probe.precision import coarser

BLOCK = 1 << 18
"""Values in a block of rows: 1 MB in float32, which stays in the processor's cache."""
SAMPLE = 1 << 17
"""Values of a site that a diagnosis looks at, spread over all of it."""
BLOCKS = 8
"""Blocks of rows that the sample consists of."""
FEW = 1 << 12
"""Values of the sample on which a rounding mode that explains too little is rejected."""
UNEXPLAINED = 1e-2
"""The share of values that a rounding mode may leave unexplained."""
STEPS, DORA_STEPS = 2.01, 12.01
"""How far another arithmetic may be off, in steps of the grid: its sum is rounded, and so is what it adds; for DoRA the
magnitude, the norm, their quotient and its product as well (up to 9 steps were measured for PEFT in bfloat16)."""
COARSE = 2.0**-9
"""The error of a product whose factors have 10 bits (TF32 on a GPU), relative to the sum of its magnitudes: twice that
of one factor."""
REBASED = 2.0**-15
"""How far two ways to compute a singular value decomposition in float32 differ, relative to a typical value of ΔW."""


@dataclass
class Sums:
    """Sums over all values of a site. ΔW is the exact change in float32; W and ΔW are as `mode` rounds them.

    `energy` ‖ΔW‖², `applied` ⟨merged − W, ΔW⟩, `kept` ⟨replay − W, ΔW⟩, `residual` ‖merged − W − ΔW‖², `error`
    ‖merged − replay‖²; `changed` values differ from W, `other` from the replay, `unexplained` from all results that
    an order of the sums can have; `far` lie further from W + ΔW than another arithmetic would put them. `longer` is
    ⟨merged − replay, replay⟩, of a `weight` of ‖replay‖².
    """

    count: int = 0
    changed: int = 0
    other: int = 0
    unexplained: int = 0
    far: int = 0
    not_finite: int = 0
    energy: float = 0.0
    applied: float = 0.0
    kept: float = 0.0
    residual: float = 0.0
    error: float = 0.0
    weight: float = 0.0
    longer: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Values of a site spread over its rows. `w` is not rounded yet; `raw` is the merged model's, as in the file."""

    rows: Indices
    w: Floats
    raw: Raw


@dataclass(frozen=True)
class Measured:
    """A site after its pass. `raw` are the factors as stored, `change` as `mode` rounds them. `explained`: few
    values of the sample are outside of what `mode` can give. `on_rebased`: W is without the part that the
    initialisation takes out."""

    site: Site
    stored: str
    mode: RoundingMode
    modes: tuple[RoundingMode, ...]
    raw: Change
    change: Change
    origin: Origin
    grid: str | None
    """The dtype that `origin` lies on; None if it is not the base's own."""
    sample: Sample
    magnitude: Magnitude | None
    explained: bool = False
    on_rebased: bool = False
    sums: Sums = field(default_factory=Sums)

    def cast(self, w: Floats) -> Floats:
        """Values of W in the dtype in which the mode computes. Those of a file in that dtype are there already."""
        return w if self.grid == self.mode.compute else through(w, self.mode.compute)


@dataclass(frozen=True)
class Target:
    """Where a site lies in the merged model: rows of a tensor there."""

    tensor: StoredTensor
    start: int

    def rows(self, start: int, stop: int) -> Raw:
        return self.tensor.rows(self.start + start, self.start + stop)


def measure(site: Site, base: Checkpoint, merged: StoredTensor, adapter: Adapter) -> Measured:
    """Choose the rounding mode on a sample, then pass over all values of the site once.

    An initialisation that takes a part out of the base is undone first, as PEFT does; where only the
    whole base explains the merge, `on_rebased` is False.
    """
    target = Target(merged, site.start)
    change, origin = change_of(site, adapter), origin_of(site, base)
    header = site.source or (site.pair.a if site.pair is not None else None)
    assert header is not None
    stored = base.tensors[site.tensor].dtype
    modes = rounding_modes(site.kind, stored, merged.dtype, header.dtype, site.magnitude is not None)

    def choose(origin: Origin, grid: str | None) -> Measured:
        sample = take(origin, target, change.shape[0])
        blank = Measured(site, merged.dtype, modes[0], tuple(modes), change, change, origin, grid, sample, None)
        return _choose(blank, adapter)

    measured = choose(origin, stored)
    if site.rebased is not None:
        other = replace(choose(rebased(site, origin, change, merged.dtype), None), on_rebased=True)
        measured = other if _distance(other) <= _distance(measured) else measured
    sums = Sums()
    step = max(1, BLOCK // merged.matrix[1])
    for start in range(0, change.shape[0], step):
        _add(sums, measured, target, start, min(start + step, change.shape[0]))
    return replace(measured, sums=sums)


def _choose(blank: Measured, adapter: Adapter) -> Measured:
    """The first mode that explains the sample, else the one that explains nearly all of it, else PEFT's."""
    best, fewest = None, 0
    for mode in blank.modes:
        measured = under(blank, mode, adapter)
        few = thinned(measured, FEW)
        count = int(unexplained(few).sum())
        if count <= 2 * UNEXPLAINED * few.sample.w.size:
            count = int(unexplained(measured).sum())
            measured = replace(measured, explained=count <= UNEXPLAINED * measured.sample.w.size)
        if best is None or (measured.explained and (count < fewest or not best.explained)):
            best, fewest = measured, count
        if measured.explained and count == 0:
            break
    assert best is not None
    return best


def under(measured: Measured, mode: RoundingMode, adapter: Adapter | None = None) -> Measured:
    """The same site with another rounding mode; the norms of DoRA are computed again if `adapter` is passed."""
    change = measured.raw.rounded(mode.factors)
    norms = measured.magnitude
    if measured.site.magnitude is not None and adapter is not None:
        columns = measured.site.kind in ("conv1d", "embedding")
        m, step = adapter.values(measured.site.magnitude), max(1, BLOCK // change.shape[1])
        norms = magnitude(m, measured.origin, change, columns, mode.compute, step)
    return replace(measured, mode=mode, change=change, magnitude=norms)


def take(origin: Origin, target: Target, height: int) -> Sample:
    """Up to SAMPLE values in BLOCKS blocks of rows."""
    wanted = max(1, min(height, SAMPLE // target.tensor.matrix[1]))
    pieces = min(BLOCKS, wanted)
    each = wanted // pieces
    starts = np.linspace(0, height - each, pieces).astype(int)
    spans = [(int(start), int(start) + each) for start in starts]
    rows = np.concatenate([np.arange(start, stop) for start, stop in spans])
    w = np.concatenate([origin(start, stop) for start, stop in spans])
    raw = np.concatenate([target.rows(start, stop) for start, stop in spans])
    return Sample(rows, w, raw)


def thinned(measured: Measured, values: int) -> Measured:
    """The same site with a sample of about `values` values."""
    sample = measured.sample
    step = max(1, sample.w.size // values)
    return replace(measured, sample=Sample(sample.rows[::step], sample.w[::step], sample.raw[::step]))


def observed_change(measured: Measured) -> Floats:
    """merged − W on the sample."""
    return widen(measured.sample.raw, measured.stored) - measured.cast(measured.sample.w)


def sampled(measured: Measured) -> Callable[[float], Raw]:
    """What the merge with a factor times the scaling gives on the sample. B·A is formed once for all factors."""
    w, product = _parts(measured)

    def merge(f: float) -> Raw:
        return replay(w, product, measured.change.scaling * f, measured.mode, measured.stored, _turn(measured, f))

    return merge


def _parts(measured: Measured) -> tuple[Floats, Floats]:
    return measured.cast(measured.sample.w), measured.change.product(measured.sample.rows)


def _turn(measured: Measured, f: float) -> Floats | None:
    return measured.magnitude.factor(measured.sample.rows, f) if measured.magnitude is not None else None


def unexplained(measured: Measured, f: float = 1.0, times: int = 1) -> npt.NDArray[np.bool_]:
    """Which values of the sample no order of the sums can explain: `[values that differ from the replay]`."""
    (w, product), factor = _parts(measured), _turn(measured, f)
    scaling = measured.change.scaling * f
    raw = replay(w, product, scaling, measured.mode, measured.stored, factor, times)
    at = np.nonzero(measured.sample.raw != raw)
    magnitudes = measured.change.magnitudes(measured.sample.rows, *at)
    return _outside(measured, scaling, w, product, factor, measured.sample.raw, at, magnitudes, times)


def _outside(
    measured: Measured,
    scaling: float,
    w: Floats,
    product: Floats,
    factor: Floats | None,
    merged: Raw,
    at: tuple[Indices, ...],
    magnitudes: Floats,
    times: int = 1,
) -> npt.NDArray[np.bool_]:
    """Whether the merged values at `at` are outside of what any order of the sums can give."""
    if not at[0].size:
        return np.zeros(0, np.bool_)
    turned = None if factor is None else np.broadcast_to(factor, w.shape)[at]
    slack = (measured.change.gamma * magnitudes).astype(np.float32)
    low, high = possible(w[at], product[at], slack, scaling, measured.mode, measured.stored, turned, times)
    value = widen(merged[at], measured.stored)
    return ~((low <= value) & (value <= high))


def _distance(measured: Measured) -> float:
    """‖merged − replay‖ on the sample."""
    with np.errstate(invalid="ignore", over="ignore"):
        difference = widen(sampled(measured)(1.0), measured.stored) - widen(measured.sample.raw, measured.stored)
        return float(np.linalg.norm(np.nan_to_num(difference, nan=np.inf, posinf=np.inf)))


def _add(sums: Sums, measured: Measured, target: Target, start: int, stop: int) -> None:
    """Add one block of rows to the sums."""
    mode, stored, change = measured.mode, measured.stored, measured.change
    w = measured.cast(measured.origin(start, stop))
    rows = slice(start, stop)
    product = change.product(rows)
    factor = measured.magnitude.factor(np.arange(start, stop)) if measured.magnitude is not None else None
    merged = target.rows(start, stop)
    wanted = replay(w, product, change.scaling, mode, stored, factor)
    value = widen(merged, stored)
    delta = product * np.float32(change.scaling)
    delta_w = factor * (w + delta) - w if factor is not None else delta
    observed = value - w
    sums.count += merged.size
    sums.changed += int(np.count_nonzero(observed))
    applied = _dot(observed, delta_w)
    sums.energy += _dot(delta_w, delta_w)
    sums.applied += applied
    observed -= delta_w
    sums.residual += _dot(observed, observed)
    if np.array_equal(merged, wanted):
        sums.kept += applied
        return
    at = np.nonzero(merged != wanted)
    replayed = widen(wanted, stored)
    sums.kept += _dot(replayed - w, delta_w)
    sums.error += _dot(value - replayed, value - replayed)
    sums.weight += _dot(replayed, replayed)
    sums.longer += _dot(value - replayed, replayed)
    sums.other += len(at[0])
    sums.not_finite += int(np.count_nonzero(~np.isfinite(value)))
    magnitudes = change.magnitudes(rows, *at)
    outside = _outside(measured, change.scaling, w, product, factor, merged, at, magnitudes)
    sums.unexplained += int(np.count_nonzero(outside))
    largest = np.maximum.reduce([np.abs(value[at]), np.abs(w[at]), np.abs(delta[at])])
    steps = spacing(largest, coarser(stored, mode.compute))
    allowed = (STEPS if factor is None else DORA_STEPS) * steps + COARSE * abs(change.scaling) * magnitudes
    if measured.on_rebased:
        allowed += REBASED * np.sqrt(np.mean(np.square(delta)))
    sums.far += int(np.count_nonzero(outside & ~(np.abs(observed[at]) <= allowed)))


def _dot(one: Floats, other: Floats) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.dot(one.reshape(-1), other.reshape(-1)))


def replaced(site: Site, base: Checkpoint, merged: StoredTensor, adapter: Adapter) -> Sums:
    """The sums of a site whose values are the adapter's own (`modules_to_save`, trained tokens): ΔW = value − W."""
    values, sums = values_of(site, adapter), Sums()
    places = {token: number for number, token in enumerate(site.tokens)}
    height, step = site.stop - site.start, max(1, BLOCK // merged.matrix[1])
    tensor = base.tensors[site.tensor]
    for start in range(0, height, step):
        stop = min(start + step, height)
        w = through(widen(tensor.rows(start, stop), tensor.dtype), merged.dtype)
        wanted_values = w.copy() if site.kind == "tokens" else values[start:stop]
        for row in range(start, stop) if places else ():
            if row in places:
                wanted_values[row - start] = values[places[row]]
        _add_replaced(sums, w, wanted_values, merged.rows(start, stop), merged.dtype)
    return sums


def _add_replaced(sums: Sums, w: Floats, values: Floats, raw: Raw, stored: str) -> None:
    wanted = narrow(values, stored)
    merged, replayed = widen(raw, stored), widen(wanted, stored)
    delta, observed = values - w, merged - w
    sums.count += raw.size
    sums.changed += int(np.count_nonzero(observed))
    sums.other += int(np.count_nonzero(raw != wanted))
    sums.not_finite += int(np.count_nonzero(~np.isfinite(merged)))
    sums.energy += _dot(delta, delta)
    sums.applied += _dot(observed, delta)
    sums.kept += _dot(replayed - w, delta)
    sums.residual += _dot(observed - delta, observed - delta)
