"""The two matrices that x is multiplied with, of a pair of a file.

In: an adapter and one of its pairs. Out: A `[r, in]` and B `[out, r]` with ΔW = s·B·A, also for variants of LoRA that
store them in another way: the blocks of BD-LoRA, the diagonal of KaSA.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_probe.adapter.checkpoint import Adapter, AdapterModule
from lora_probe.adapter.variants import EXTRAS, KASA
from lora_probe.files.weights import TensorHeader

Floats = npt.NDArray[np.float32]


def extra_of(pair: AdapterModule, field: str) -> TensorHeader | None:
    """The third tensor of a pair that the config's `field` asks for; None if the file has none."""
    extra = EXTRAS[field]
    return next((tensor for tensor in pair.extras if extra.is_named(tensor.name)), None)


def is_stored_whole(adapter: Adapter, pair: AdapterModule) -> bool:
    """Whether A and B in the file are the matrices themselves."""
    return pair.blocks == (1, 1) and _diagonal(adapter, pair) is None


def _diagonal(adapter: Adapter, pair: AdapterModule) -> TensorHeader | None:
    """KaSA's diagonal. Without its flag in the config, PEFT drops one of the file."""
    return extra_of(pair, KASA.field) if adapter.config.raw.get(KASA.field) else None


def pair_values(adapter: Adapter, pair: AdapterModule) -> tuple[Floats, Floats]:
    """A and B of a pair that has both.

    Raises:
        UnreadableFile: the values are not floats, or the file is damaged.
    """
    assert pair.a is not None
    assert pair.b is not None
    a, b = adapter.values(pair.a), adapter.values(pair.b)
    a, b = (on_diagonal(half, blocks) for half, blocks in zip((a, b), pair.blocks, strict=True))
    diagonal = _diagonal(adapter, pair)
    if diagonal is not None and diagonal.shape == a.shape[:1]:
        a = a * adapter.values(diagonal)[:, None]
    return a, b


def on_diagonal(blocks: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """The matrix `[rows, count · columns]` of `count` blocks that are stored one below the other, `[rows, columns]`."""
    if count == 1:
        return blocks
    rows, columns = blocks.shape
    whole = np.zeros((rows, count * columns), np.float32)
    for number, block in enumerate(np.split(blocks, count)):
        height = len(block)
        whole[number * height :, number * columns :][:height, :columns] = block
    return whole
