"""What an adapter does to the rows of one site, in numbers: `Change` (ΔW = s·left·right) and `Origin` (W before it).

In: a site, the adapter, the base's checkpoint. Out: stretches of ΔW in float32 with a bound on what the order of its
sums can change, and stretches of W. The products are never formed whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import Adapter
from lora_probe.checkpoint import Checkpoint
from lora_probe.merging.sites import Site
from lora_probe.rounding import Floats, through
from lora_probe.weights import widen

Origin = Callable[[int, int], Floats]
"""W of a stretch of the site's rows, in float32, not yet rounded to the dtype that is merged in."""

Indices = npt.NDArray[np.intp]
UNIT = 2.0**-24
DENSE = 8
"""From one value in this many on, a whole product is cheaper than picking rows and columns."""


@dataclass(frozen=True)
class Change:
    """`scaling · left @ right`, laid out as the tensor lies in the file. `left: [rows, r]`, `right: [r, columns]`."""

    left: Floats
    right: Floats
    scaling: float

    def delta(self, start: int, stop: int) -> Floats:
        """ΔW of rows `start` to `stop`, in float32: product first, then the scaling, as PEFT does."""
        product: Floats = self.left[start:stop] @ self.right
        product *= np.float32(self.scaling)
        return product

    def slack(self, rows: Indices, at: Indices, columns: Indices) -> Floats:
        """How far two orders of summing in float32, and of multiplying by the scaling, may lie apart.

        Given are row numbers, and the places (index in `rows`, column) of some values. |fl(s·Σ) − s·Σ| ≤ γ·|s|·Σ|left|·
        |right| with γ = (r + 2)·u (Higham, Accuracy and Stability, 3.1), for each of the two.
        """
        if len(at) * DENSE > len(rows) * self.right.shape[1]:
            sums = (np.abs(self.left[rows]) @ np.abs(self.right))[at, columns]
        else:
            sums = np.einsum("nr,nr->n", np.abs(self.left[rows[at]]), np.abs(self.right[:, columns].T))
        gamma = 2 * (self.left.shape[1] + 2) * UNIT
        bound: Floats = (gamma * abs(self.scaling) * sums).astype(np.float32)
        return bound

    def rounded(self, dtype: str | None) -> Change:
        """The same with both factors rounded to `dtype` first."""
        if dtype is None:
            return self
        return replace(self, left=through(self.left, dtype), right=through(self.right, dtype))

    def scaled(self, factor: float) -> Change:
        return replace(self, scaling=self.scaling * factor)


def change_of(site: Site, adapter: Adapter) -> Change:
    """The factors of a site. A bias is a product of rank one: `left` is 1."""
    if site.kind == "bias":
        assert site.source is not None
        return Change(np.ones((1, 1), np.float32), adapter.values(site.source)[None, :], site.scaling)
    assert site.pair is not None
    assert site.pair.a is not None
    assert site.pair.b is not None
    a, b = adapter.values(site.pair.a), adapter.values(site.pair.b)
    if site.experts > 1:
        # PEFT's ParamWrapper: A is (experts·r, in), B (out, r·experts) with the expert running fastest.
        number = site.key[2]
        a = a.reshape(site.experts, -1, a.shape[1])[number]
        b = np.ascontiguousarray(b.reshape(b.shape[0], -1, site.experts)[:, :, number])
    if site.cut is not None:
        b = b[site.cut[0] : site.cut[1]]
    if site.kind in ("conv1d", "embedding", "transposed expert"):
        return Change(a.T, b.T, site.scaling)
    return Change(b, a, site.scaling)


def values_of(site: Site, adapter: Adapter) -> Floats:
    """The rows that replace the base's: `[rows, columns]`; of trained tokens one row each."""
    assert site.source is not None
    values = adapter.values(site.source)
    return values.reshape(-1, values.shape[-1] if values.ndim else 1)


def origin_of(site: Site, base: Checkpoint, adapter: Adapter) -> Origin:
    """W of the site as it is stored: in the base, or in the adapter where that carries it."""
    if site.original is not None:
        own = adapter.values(site.original)
        own = own.reshape(-1, own.shape[-1])
        return lambda start, stop: own[site.start + start : site.start + stop]
    tensor = base.tensors[site.tensor]
    return lambda start, stop: widen(tensor.rows(site.start + start, site.start + stop), tensor.dtype)


def rebased(site: Site, origin: Origin, change: Change, dtype: str) -> Origin:
    """W without the part that the initialisation took out of it, as PEFT computes it on every load, in float32.

    PiSSA takes the r largest singular triples of W (arXiv:2404.02948), OLoRA s·Q[:, :r]·R[:r] of W = Q·R
    (arXiv:2406.01775); `pissa_init` and `olora_init` in PEFT's `tuners/lora/layer.py`.
    """
    weight = through(origin(0, site.stop - site.start), dtype)
    turned = weight.T if site.kind == "conv1d" else weight
    rank = min(change.left.shape[1], *turned.shape)
    if site.rebased == "pissa":
        u, sigma, v = np.linalg.svd(turned, full_matrices=False)
        taken = (u[:, :rank] * sigma[:rank]) @ v[:rank]
    else:
        q, r = np.linalg.qr(turned)
        taken = np.float32(change.scaling) * (q[:, :rank] @ r[:rank])
    left: Floats = turned - taken.astype(np.float32)
    rest = through(np.ascontiguousarray(left.T if site.kind == "conv1d" else left), dtype)
    return lambda start, stop: rest[start:stop]
