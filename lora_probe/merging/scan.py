"""One site of a merge, measured: every value against what PEFT's merge gives there.

In: a site, base, merged model and adapter. Out: `Sums` over all of the site's values under the order of rounding that
explains a sample of them best, and a `Sample` for whoever has to find out what went wrong. Memory: blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import Adapter
from lora_probe.checkpoint import Checkpoint, StoredTensor
from lora_probe.merging.change import Change, Origin, change_of, origin_of, rebased, values_of
from lora_probe.merging.replay import Magnitude, Order, magnitude, orders, possible, replay
from lora_probe.merging.sites import Site
from lora_probe.rounding import Floats, Raw, narrow, spacing, through
from lora_probe.weights import widen

BLOCK = 1 << 18
"""Values in a block of rows: 1 MB in float32, which stays in the processor's cache."""
SAMPLE = 1 << 17
"""Values of a site that a diagnosis looks at, spread over all of it."""
STRETCHES = 8
FEW = 1 << 12
"""Values of the sample that reject what explains too little of them."""
FOREIGN = 1e-2
"""The share of values that may be foreign to an order of rounding that the others follow."""


@dataclass
class Sums:
    """Over all values of a site. ΔW is the exact change in float32; W and ΔW as `order` sees them.

    `energy` ‖ΔW‖², `applied` ⟨merged − W, ΔW⟩, `kept` ⟨replay − W, ΔW⟩, `residual` ‖merged − W − ΔW‖², `error`
    ‖merged − replay‖²; `changed` values differ from W, `other` from the replay, `unexplained` from all that the order
    of the sums can give; `far` lie more than a step of the grid from W + ΔW.
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


@dataclass(frozen=True)
class Sample:
    """Values of a site spread over its rows. `w` is not rounded yet; `raw` is the merged model's, as in the file."""

    rows: npt.NDArray[np.intp]
    w: Floats
    raw: Raw


@dataclass
class Measured:
    """A site after its pass. `raw` are the factors as stored, `change` as `order` rounds them. `explained`: hardly a
    value of the sample lies outside of what `order` gives."""

    site: Site
    stored: str
    order: Order
    explained: bool
    raw: Change
    change: Change
    origin: Origin
    sums: Sums
    sample: Sample
    magnitude: Magnitude | None = None
    on_rebased: bool = False
    orders: list[Order] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """Where a site lies in the merged model: rows of a tensor there."""

    tensor: StoredTensor
    start: int

    def rows(self, start: int, stop: int) -> Raw:
        return self.tensor.rows(self.start + start, self.start + stop)


def measure(site: Site, base: Checkpoint, merged: StoredTensor, adapter: Adapter) -> Measured:
    """Choose the order of rounding on a sample, then pass over all values of the site once."""
    target = Target(merged, site.start)
    height = site.stop - site.start
    change, origin = change_of(site, adapter), origin_of(site, base, adapter)
    stored = base.tensors[site.tensor].dtype
    header = site.source or (site.pair.a if site.pair is not None else None)
    assert header is not None
    known = orders(site.kind, stored, merged.dtype, header.dtype, site.magnitude is not None)
    found = _choose(site, change, origin, target, known, height, adapter)
    if site.rebased is not None and not found.explained:
        # The base at hand may be the one before the initialisation took its part, or the one after.
        other = rebased(site, origin, change, merged.dtype)
        second = _choose(site, change, other, target, known, height, adapter)
        if _distance(second) < _distance(found):
            found = second
            found.on_rebased = True
    step = max(1, BLOCK // merged.matrix[1])
    for start in range(0, height, step):
        _add(found, target, start, min(start + step, height))
    return found


def _choose(
    site: Site,
    change: Change,
    origin: Origin,
    target: Target,
    known: list[Order],
    height: int,
    adapter: Adapter,
) -> Measured:
    sample = take(origin, target, height)
    best: Measured | None = None
    fewest = 0
    for order in known:
        rounded = change.rounded(order.factors)
        norms = None
        if site.magnitude is not None:
            columns = site.kind in ("conv1d", "embedding")
            step = max(1, BLOCK // change.right.shape[1])
            m = adapter.values(site.magnitude)
            norms = magnitude(m, origin, rounded, height, columns, order.compute, step)
        found = Measured(
            site, target.tensor.dtype, order, False, change, rounded, origin, Sums(), sample, norms, orders=known
        )
        few = thinned(found, FEW)
        count = int(unexplained(few).sum())
        if count <= 2 * FOREIGN * few.sample.w.size:
            count = int(unexplained(found).sum())
            found.explained = count <= FOREIGN * sample.w.size
        if best is None or (found.explained and count < fewest):
            best, fewest = found, count
        if count == 0:
            break
    assert best is not None
    return best


def take(origin: Origin, target: Target, height: int) -> Sample:
    """Up to SAMPLE values in STRETCHES stretches of rows."""
    wanted = max(1, min(height, SAMPLE // target.tensor.matrix[1]))
    pieces = min(STRETCHES, wanted)
    each = wanted // pieces
    starts = np.linspace(0, height - each, pieces).astype(int)
    spans = [(int(start), int(start) + each) for start in starts]
    rows = np.concatenate([np.arange(start, stop) for start, stop in spans])
    w = np.concatenate([origin(start, stop) for start, stop in spans])
    raw = np.concatenate([target.rows(start, stop) for start, stop in spans])
    return Sample(rows, w, raw)


def thinned(found: Measured, values: int) -> Measured:
    """The same site with a sample of about `values` values."""
    sample = found.sample
    step = max(1, sample.w.size // values)
    return replace(found, sample=Sample(sample.rows[::step], sample.w[::step], sample.raw[::step]))


def observed_change(found: Measured) -> Floats:
    """merged − W on the sample."""
    return widen(found.sample.raw, found.stored) - through(found.sample.w, found.order.compute)


def sampled(found: Measured, f: float = 1.0, times: int = 1) -> Raw:
    """What the merge with `f` times the scaling gives on the sample."""
    w, delta, factor = _parts(found, f)
    return replay(w, delta, found.order, found.stored, factor, times)


def _parts(found: Measured, f: float) -> tuple[Floats, Floats, Floats | None]:
    sample = found.sample
    w = through(sample.w, found.order.compute)
    delta = found.change.left[sample.rows] @ found.change.right
    delta *= np.float32(found.change.scaling * f)
    factor = found.magnitude.factor(sample.rows, f) if found.magnitude is not None else None
    return w, delta, factor


def unexplained(found: Measured, f: float = 1.0, times: int = 1) -> npt.NDArray[np.bool_]:
    """Which values of the sample no order of the sums explains: `[values that differ from the replay]`."""
    w, delta, factor = _parts(found, f)
    raw = replay(w, delta, found.order, found.stored, factor, times)
    scaled = found.change.scaled(f)
    return _outside(found, scaled, found.sample.rows, w, delta, factor, found.sample.raw, raw, times)


def _outside(
    found: Measured,
    change: Change,
    rows: npt.NDArray[np.intp],
    w: Floats,
    delta: Floats,
    factor: Floats | None,
    merged: Raw,
    raw: Raw,
    times: int = 1,
) -> npt.NDArray[np.bool_]:
    at, columns = np.nonzero(merged != raw)
    if not at.size:
        return np.zeros(0, np.bool_)
    turned = None if factor is None else np.broadcast_to(factor, w.shape)[at, columns]
    slack = change.slack(rows, at, columns)
    low, high = possible(w[at, columns], delta[at, columns], slack, found.order, found.stored, turned, times)
    value = widen(merged[at, columns], found.stored)
    return ~((low <= value) & (value <= high))


def _distance(found: Measured) -> float:
    """‖merged − replay‖ on the sample."""
    difference = widen(sampled(found), found.stored) - widen(found.sample.raw, found.stored)
    return float(np.linalg.norm(np.nan_to_num(difference, nan=np.inf, posinf=np.inf)))


def _add(found: Measured, target: Target, start: int, stop: int) -> None:
    """Take one block of rows into the sums."""
    sums, order, stored = found.sums, found.order, found.stored
    w = through(found.origin(start, stop), order.compute)
    delta = found.change.delta(start, stop)
    rows = np.arange(start, stop)
    factor = found.magnitude.factor(rows) if found.magnitude is not None else None
    merged = target.rows(start, stop)
    wanted = replay(w, delta, order, stored, factor)
    value = widen(merged, stored)
    delta_w = factor * (w + delta) - w if factor is not None else delta
    observed = value - w
    same = merged == wanted
    differs = same.size - int(np.count_nonzero(same))
    sums.count += same.size
    sums.changed += int(np.count_nonzero(observed))
    energy, applied = _dot(delta_w, delta_w), _dot(observed, delta_w)
    sums.energy += energy
    sums.applied += applied
    observed -= delta_w
    sums.residual += _dot(observed, observed)
    if not differs:
        sums.kept += applied
        return
    replayed = widen(wanted, stored)
    sums.kept += _dot(replayed - w, delta_w)
    sums.error += _dot(value - replayed, value - replayed)
    sums.other += differs
    sums.not_finite += int(np.count_nonzero(~np.isfinite(value)))
    outside = _outside(found, found.change, rows, w, delta, factor, merged, wanted)
    sums.unexplained += int(np.count_nonzero(outside))
    steps = spacing(np.maximum(np.abs(value[~same]), np.abs(w[~same])), _coarser(stored, order.compute))
    sums.far += int(np.count_nonzero(np.abs(observed[~same][outside]) > 1.01 * steps[outside]))


def _coarser(one: str, other: str) -> str:
    return max(one, other, key=("F32", "F16", "BF16").index)


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
    differs = int(np.count_nonzero(raw != wanted))
    sums.other += differs
    sums.unexplained += differs
    sums.not_finite += int(np.count_nonzero(~np.isfinite(merged)))
    sums.energy += _dot(delta, delta)
    sums.applied += _dot(observed, delta)
    sums.kept += _dot(replayed - w, delta)
    sums.residual += _dot(observed - delta, observed - delta)
    sums.error += _dot(merged - replayed, merged - replayed)
