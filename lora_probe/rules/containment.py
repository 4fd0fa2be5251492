"""How much of a pair's ΔW = s·B·A a weight of the base already contains.

In: A, B and the scaling of a module, and its weight W in the base. Out: a `Share`: ⟨W, ΔW⟩ / |ΔW|², which is 1 if ΔW
was added to an unrelated weight once and 0 if it was not; how far an unrelated weight may move it; and whether there is
another weight besides ΔW at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.pair_values import pair_values
from lora_probe.base import Base
from lora_probe.errors import UnreadableFile
from lora_probe.files.limits import step
from lora_probe.rules.initialisation import Floats, fits, spread, weight_of

SAMPLED = 4
"""Modules whose weights are read, evenly spread over the adapter."""
MOST_RANK = 512
"""Pairs of a higher rank are not checked: nobody trains them, and the work grows with it."""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """`value` of ΔW is in the weight; a weight that has nothing to do with ΔW moves it by `noise` (one deviation).

    `rest` is the rms of what W makes of ΔW's outputs outside of ΔW's inputs, relative to the rms of W: about 1 or more
    if ΔW was added to an unrelated weight, and near 0 if ΔW is a part of the weight itself, as after PiSSA and OLoRA.
    """

    pair: AdapterModule
    value: float
    noise: float
    rest: float


def shares(adapter: Adapter, base: Base) -> Iterator[Share]:
    """The share for some modules of the adapter, of those whose weights can be read."""
    transposed = bool(adapter.config.raw.get("fan_in_fan_out"))
    candidates = [pair for pair in adapter.modules if pair.parameter == "weight" and fits(pair, base, transposed)]
    for pair in spread(candidates, SAMPLED):
        assert pair.a is not None
        if pair.a.shape[0] > MOST_RANK:
            continue
        step(f"comparing {pair.module} with the base model's weight", adapter.weights.path)
        try:
            (a, b), weight = pair_values(adapter, pair), weight_of(base, pair.module)
        except UnreadableFile:
            continue
        measured = None if weight is None else share(a, b, pair.scaling, weight.T if transposed else weight)
        if measured is not None:
            yield Share(pair, *measured)


CLEAR, ALONE = 0.06, 0.03
"""The largest noise of a module that counts, and of one that is the only one. Fine-tuning changes a weight along its
own strong directions, so shares of unmerged adapters were up to 6 deviations from 0; 0.5, the middle, is 8 of them."""
NEAR = 0.3
"""How far from 1 the mean share may be. Measured on tiny models that were trained and then fine-tuned (ranks 1 to 64,
scalings 0.25 to 8, seven seeds; merged in float32, bfloat16 and float16): modules that count had shares between
-0.14 and 0.25 before the merge, and between 0.86 and 1.25 after it. The rounding of bfloat16 moved a share by at most
0.02."""
UNRELATED = 0.5
"""The least rest of a weight that ΔW was added to. Measured: 0.9 or more for all of these, between 0.2 and 0.4 for
PiSSA and OLoRA after some training."""


def contained(measured: Sequence[Share]) -> tuple[float, Sequence[Share]] | None:
    """The mean share and the modules that count, if they contain ΔW; None if they do not, or if nothing can be told."""
    clear = [share for share in measured if share.noise <= CLEAR]
    if not clear or (len(clear) == 1 and clear[0].noise > ALONE):
        return None
    if not all(abs(share.value - 1) < 0.5 and share.rest > UNRELATED for share in clear):
        return None
    # By the least noise, so that a module whose weight tells little has little to say.
    weights = [1 / max(share.noise, 1e-6) ** 2 for share in clear]
    mean = sum(weight * share.value for weight, share in zip(weights, clear, strict=True)) / sum(weights)
    return (mean, clear) if abs(mean - 1) < NEAR else None


def share(a: Floats, b: Floats, scaling: float, weight: Floats) -> tuple[float, float, float] | None:
    """The share, its noise and the rest, for `weight: [out, in]`.

    None if ΔW is zero, if anything is not finite, or if the rank leaves no direction outside of ΔW.

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
    if not total > 0 or len(size) >= min(weight.shape):
        return None
    # In float32: a copy of a large weight in float64 would need twice the memory of the weight itself.
    outputs, inputs = left @ u, right @ v.T
    rows = (outputs.T.astype(np.float32) @ weight).astype(np.float64)
    columns = (weight @ inputs.astype(np.float32)).astype(np.float64)
    seen = rows @ inputs
    value = float((size * np.diag(seen)).sum()) / total
    # Without the merge W₀ is W, with it W - ΔW; the other of the two counts ΔW as noise.
    added = np.diag(size)
    unmerged = _noise(size, rows, columns, seen)
    noise = min(unmerged, _noise(size, rows - added @ inputs.T, columns - outputs @ added, seen - added))
    return value, noise, _rest(weight, size, rows, columns, seen)


def _noise(size: Doubles, rows: Doubles, columns: Doubles, seen: Doubles) -> float:
    """The deviation of the share, by Uᵀ·W, W·V and M."""
    squares = np.maximum(np.square(rows).mean(axis=1), np.square(columns).mean(axis=0))
    if len(size) > 1:
        beside = np.square(seen) * (1 - np.eye(len(size)))
        squares = np.maximum(squares, (beside.sum(axis=0) + beside.sum(axis=1)) / (2 * (len(size) - 1)))
    return float(np.sqrt((np.square(size) * squares).sum()) / np.square(size).sum())


def _rest(weight: Floats, size: Doubles, rows: Doubles, columns: Doubles, seen: Doubles) -> float:
    """`Share.rest`, by the squares of Uᵀ·W, of W·V and of what both have in common, M. W itself is taken without them:
    a large ΔW would outweigh it."""
    tall, wide = weight.shape[0] - len(size), weight.shape[1] - len(size)
    outside = np.square(rows).sum(axis=1) - np.square(seen).sum(axis=1)
    elsewhere = float(np.linalg.norm(weight)) ** 2 - np.square(columns).sum() - outside.sum()
    if not elsewhere > 0:
        return 0.0
    share_outside = (np.square(size) * outside.clip(0)).sum() / np.square(size).sum() / wide
    return float(np.sqrt(share_outside / (elsewhere / tall / wide)))
