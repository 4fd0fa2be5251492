"""What an adapter does to the rows of one site, in numbers: `Change` (ΔW = s·left·right) and `Origin` (W before it).

In: a site, the adapter, the base's checkpoint. Out: blocks of rows of B·A in float32, with a bound on what
the order of its sums can change, and blocks of rows of W. The products are never formed whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import Adapter
from lora_probe.adapter.fused import of_expert
from lora_probe.adapter.pair_values import pair_values
from lora_probe.base import Checkpoint
from lora_probe.files.values import widen
from lora_probe.merging.rounding import Floats, through
from lora_probe.merging.sites import Site
from lora_probe.precision import FLOAT32

Origin = Callable[[int, int], Floats]
"""W of a block of the site's rows, in float32, not yet rounded to the dtype that is merged in."""

Indices = npt.NDArray[np.intp]
DENSE = 8
"""Where more than one value in this many is wanted, the whole product is cheaper than picking rows and columns."""


@dataclass(frozen=True)
class Change:
    """`scaling · left @ right`, laid out as the tensor lies in the file. `left: [rows, r]`, `right: [r, columns]`."""

    left: Floats
    right: Floats
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    def product(self, rows: slice | Indices) -> Floats:
        """left @ right for some rows, in float32, without the scaling, by which PEFT multiplies afterwards."""
        product: Floats = self.left[rows] @ self.right
        return product

    def magnitudes(self, rows: slice | Indices, at: Indices, columns: Indices) -> Floats:
        """Σ|left|·|right| at the places (index in `rows`, column) of some values."""
        left = self.left[rows]
        if len(at) * DENSE > len(left) * self.right.shape[1]:
            dense: Floats = (np.abs(left) @ np.abs(self.right))[at, columns]
            return dense
        picked: Floats = np.einsum("nr,nr->n", np.abs(left[at]), np.abs(self.right[:, columns].T))
        return picked

    @property
    def gamma(self) -> float:
        """|fl(Σ) − Σ| ≤ γ·Σ|left|·|right| for any order of summing r products in float32, a rounding of the scaling
        included: γ = (r + 2)·u (Higham, Accuracy and Stability, 3.1); twice that for the difference of two orders."""
        return 2 * (self.rank + 2) * FLOAT32.round_off

    def rounded(self, dtype: str | None) -> Change:
        """The same with both factors rounded to `dtype` first."""
        if dtype is None:
            return self
        return replace(self, left=through(self.left, dtype), right=through(self.right, dtype))


def change_of(site: Site, adapter: Adapter) -> Change:
    """The factors of a site. A bias is a product of rank one: `left` is 1."""
    if site.kind == "bias":
        assert site.source is not None
        return Change(np.ones((1, 1), np.float32), adapter.values(site.source)[None, :], site.scaling)
    assert site.pair is not None
    a, b = pair_values(adapter, site.pair)
    if site.experts > 1:
        assert site.key[2] is not None
        a, b = of_expert(a, b, site.experts, site.key[2])
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


def origin_of(site: Site, base: Checkpoint) -> Origin:
    """W of the site as it is stored."""
    tensor = base.tensors[site.tensor]
    return lambda start, stop: widen(tensor.rows(site.start + start, site.start + stop), tensor.dtype)


def rebased(site: Site, origin: Origin, change: Change, dtype: str) -> Origin:
    """W without the part that the initialisation took out of it, as PEFT computes it on every load, in float32.

    PiSSA takes the r largest singular triples of W (arXiv:2404.02948), OLoRA s·Q[:, :r]·R[:r] of W = Q·R
    (arXiv:2406.01775); `pissa_init` and `olora_init` in PEFT's `tuners/lora/layer.py`.
    """
    weight = through(origin(0, site.stop - site.start), dtype)
    turned = weight.T if site.kind == "conv1d" else weight
    rank = min(change.rank, *turned.shape)
    if site.rebased == "pissa":
        u, sigma, v = np.linalg.svd(turned, full_matrices=False)
        taken = (u[:, :rank] * sigma[:rank]) @ v[:rank]
    else:
        q, r = np.linalg.qr(turned)
        taken = np.float32(change.scaling) * (q[:, :rank] @ r[:rank])
    left: Floats = turned - taken.astype(np.float32)
    rest = through(np.ascontiguousarray(left.T if site.kind == "conv1d" else left), dtype)
    return lambda start, stop: rest[start:stop]
