"""How a merge rounds: `RoundingMode`s of casting, adding and rounding, and the bits that each of them gives.

In: W, B·A, the scaling and a rounding mode. Out: the merged values as they would lie in the file, and the interval in
which they may lie whatever the order of the sums in B·A. Rounding is monotone: rounding both ends of an interval bounds
it.

PEFT 0.21 (`Linear.merge`, `Embedding.merge`, `ParamWrapper.merge` and `DoraLinearVariant` in `tuners/lora`) keeps A
and B in float32 by default (`autocast_adapter_dtype`), adds a Linear's ΔW in float32 and rounds the sum. The ΔW of an
embedding or expert is rounded to the weight's dtype before it is added; with `safe_merge` a Linear's ΔW is too. 16-bit
factors are multiplied in float32 on a CPU; on a GPU the product is rounded before and after the scaling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.files.values import Raw, widen
from lora_probe.merging.change import Change, Indices, Origin
from lora_probe.merging.rounding import Floats, narrow, through
from lora_probe.merging.sites import SiteKind

NORM_SLACK = 2.0**-19
"""The largest relative difference of two float32 sums of a DoRA norm: 32 units of round-off."""


@dataclass(frozen=True)
class RoundingMode:
    """One way to merge. W is cast to `compute`, A and B to `factors`, B·A to `product`, ΔW to `delta` (None: float32),
    the sum to `compute`; then the result is stored in the file's dtype."""

    name: str
    compute: str
    factors: str | None = None
    product: str | None = None
    delta: str | None = None


def rounding_modes(kind: SiteKind, base: str, merged: str, adapter: str, dora: bool) -> list[RoundingMode]:
    """The rounding modes that these dtypes allow, PEFT's own first; of those with the same result only the first."""
    known: dict[tuple[str | None, ...], RoundingMode] = {}
    early = kind in ("embedding", "expert", "transposed expert") and not dora
    for compute in dict.fromkeys((merged, base, "F32", "BF16", "F16")):
        where = "" if compute == merged else f" in {compute}, saved in {merged}"
        ways = [
            ("PEFT's merge", None, None, compute if early else None),
            ("PEFT's merge with safe_merge", None, None, compute),
            (f"an adapter kept in {adapter}", None, None, adapter),
            (f"an adapter cast to {compute}", compute, None, compute),
            (f"factors in {compute}", compute, None, None),
            ("one rounding of the float32 sum", None, None, None),
            *((f"a product in {grid}", grid, grid, grid) for grid in (adapter, compute, "BF16")),
        ]
        for name, factors, product, delta in ways[:1] if dora else ways:
            if factors in (adapter, "F32") and product is None:
                # A and B are on this grid already: another line covers this.
                continue
            mode = RoundingMode(name + where, compute, _grid(factors), _grid(product), _grid(delta))
            known.setdefault((compute, mode.factors, mode.product, mode.delta), mode)
    return list(known.values())


def _grid(dtype: str | None) -> str | None:
    return None if dtype in ("F32", "F64") else dtype


@dataclass(frozen=True)
class Magnitude:
    """DoRA: the merged row (or column) is m / ‖W + f·ΔW‖ times W + f·ΔW. The sums run over the other axis, in float64,
    so that the norm can be computed for every f."""

    m: npt.NDArray[np.float64]
    base: npt.NDArray[np.float64]
    cross: npt.NDArray[np.float64]
    delta: npt.NDArray[np.float64]
    columns: bool

    def factor(self, rows: Indices, f: float = 1.0) -> Floats:
        """`[rows, 1]` or `[1, columns]`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            whole = self.m / np.sqrt(self.base + 2 * f * self.cross + f * f * self.delta)
        factors: Floats = (whole[None, :] if self.columns else whole[rows][:, None]).astype(np.float32)
        return factors


def magnitude(m: Floats, origin: Origin, change: Change, columns: bool, compute: str, step: int) -> Magnitude:
    """One pass over W for the norms of a DoRA site, `step` rows at a time. `m: [rows]` or `[columns]`."""
    height, width = change.shape
    sums = np.zeros((3, width if columns else height))
    for start in range(0, height, step):
        stop = min(start + step, height)
        w, d = through(origin(start, stop), compute), change.product(slice(start, stop)) * np.float32(change.scaling)
        for number, (left, right) in enumerate(((w, w), (w, d), (d, d))):
            products = np.einsum("ij,ij->j" if columns else "ij,ij->i", left, right, dtype=np.float64)
            if columns:
                sums[number] += products
            else:
                sums[number, start:stop] = products
    return Magnitude(m.reshape(-1).astype(np.float64), sums[0], sums[1], sums[2], columns)


def replay(
    w: Floats,
    product: Floats,
    scaling: float,
    mode: RoundingMode,
    stored: str,
    factor: Floats | None = None,
    times: int = 1,
) -> Raw:
    """The merged values as they lie in a file of dtype `stored`. `w` lies on the grid of `mode.compute`; the change
    goes in `times` times."""
    delta = through(through(product, mode.product) * np.float32(scaling), mode.delta)
    merged: Floats = w + delta
    if factor is not None:
        merged = factor * merged
    for _ in range(times - 1):
        merged = through(merged, mode.compute) + delta
    return narrow(merged if mode.compute == stored else through(merged, mode.compute), stored)


def possible(
    w: Floats,
    product: Floats,
    slack: Floats,
    scaling: float,
    mode: RoundingMode,
    stored: str,
    factor: Floats | None,
    times: int = 1,
) -> tuple[Floats, Floats]:
    """The smallest and the largest values that B·A ± `slack` can give; for DoRA the norm may be off by NORM_SLACK."""
    ends = []
    for moved in (product - slack, product + slack):
        for turn in (1.0,) if factor is None else (1 - NORM_SLACK, 1 + NORM_SLACK):
            turned = None if factor is None else factor * np.float32(turn)
            ends.append(widen(replay(w, moved, scaling, mode, stored, turned, times), stored))
    return np.minimum.reduce(ends), np.maximum.reduce(ends)
