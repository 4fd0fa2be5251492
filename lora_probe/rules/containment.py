"""How much of a pair's ΔW = s·B·A a weight of the base already contains.

In: A, B and the scaling of a module, and its weight W in the base. Out: a `Share`: ⟨W, ΔW⟩ / |ΔW|², which is 1 if ΔW
was added to an unrelated weight once and 0 if it was not, and how far an unrelated weight may move it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.base import Base
from lora_probe.errors import UnreadableFile
from lora_probe.files.limits import step
from lora_probe.rules.initialisation import Floats, fits, spread, weight_of

SAMPLED = 6
"""Modules whose weights are read, evenly spread over the adapter."""
MOST_RANK = 512
"""Pairs of a higher rank are not checked: nobody trains them, and the work grows with it."""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """`value` of ΔW is in the weight; a weight that has nothing to do with ΔW moves it by `noise` (one deviation)."""

    pair: AdapterModule
    value: float
    noise: float


def shares(adapter: Adapter, base: Base) -> Iterator[Share]:
    """The share for some modules of the adapter, of those whose weights can be read."""
    transposed = bool(adapter.config.raw.get("fan_in_fan_out"))
    candidates = [pair for pair in adapter.modules if pair.parameter == "weight" and fits(pair, base, transposed)]
    for pair in spread(candidates, SAMPLED):
        assert pair.a is not None
        assert pair.b is not None
        if pair.a.shape[0] > MOST_RANK:
            continue
        step(f"comparing {pair.module} with the base model's weight", adapter.weights.path)
        try:
            a, b, weight = adapter.values(pair.a), adapter.values(pair.b), weight_of(base, pair.module)
        except UnreadableFile:
            continue
        measured = None if weight is None else share(a, b, pair.scaling, weight.T if transposed else weight)
        if measured is not None:
            yield Share(pair, *measured)


CLEAR, ALONE = 0.1, 0.05
"""The largest noise of a module that counts, and of one that is the only one."""
NEAR = 0.3
"""How far from 1 the mean share may be. Measured on tiny models that were trained and then fine-tuned (ranks 1 to 64,
scalings 0.25 to 8, five seeds; merged in float32, bfloat16 and float16): modules with a noise up to 0.1 had shares of
-0.29 to 0.09 before the merge, and 0.71 to 1.05 after it; the rounding of bfloat16 moved a share by 0.02 at most."""


def contained(measured: Sequence[Share]) -> tuple[float, Sequence[Share]] | None:
    """The mean share and the modules that count, if they contain ΔW; None if they do not, or if nothing can be told."""
    clear = [share for share in measured if share.noise <= CLEAR]
    if not clear or (len(clear) == 1 and clear[0].noise > ALONE):
        return None
    if not all(abs(share.value - 1) < 0.5 for share in clear):
        return None
    # By the least noise, so that a module whose weight tells little has little to say.
    weights = [1 / max(share.noise, 1e-6) ** 2 for share in clear]
    mean = sum(weight * share.value for weight, share in zip(weights, clear, strict=True)) / sum(weights)
    return (mean, clear) if abs(mean - 1) < NEAR else None


def share(a: Floats, b: Floats, scaling: float, weight: Floats) -> tuple[float, float] | None:
    """The share and its noise; None if ΔW is zero or anything is not finite. `weight: [out, in]`.

    With ΔW = U·S·Vᵀ the share is Σ Sᵢ·Mᵢᵢ / Σ Sᵢ², where M = Uᵀ·W·V. If ΔW was added to W₀, then M = S + Uᵀ·W₀·V. What
    an unrelated W₀ contributes to Mᵢᵢ is estimated from what W does elsewhere in the same directions: the largest of
    the rms of uᵢᵀ·W, of W·vᵢ, and of the values of M next to its diagonal. So a weight that is large in the directions
    of ΔW, as trained weights are, is given a larger noise.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(weight).all()):
        return None
    left, core_left = np.linalg.qr(b.astype(np.float64))
    right, core_right = np.linalg.qr(a.T.astype(np.float64))
    u, size, v = np.linalg.svd(scaling * core_left @ core_right.T, full_matrices=False)
    total = float(np.square(size).sum())
    if not total > 0:
        return None
    rows = (left @ u).T @ weight
    columns = weight @ (right @ v.T)
    seen = rows @ (right @ v.T)
    noise = np.maximum(np.square(rows).mean(axis=1), np.square(columns).mean(axis=0))
    if len(size) > 1:
        beside = np.square(seen) * (1 - np.eye(len(size)))
        noise = np.maximum(noise, (beside.sum(axis=0) + beside.sum(axis=1)) / (2 * (len(size) - 1)))
    value = float((size * np.diag(seen)).sum()) / total
    return value, float(np.sqrt((np.square(size) * noise).sum())) / total
