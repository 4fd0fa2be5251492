"""The spectrum of a pair whose tensors are too large to hold: Gram matrices, a block of columns or rows at a time.

In: a weights file, the headers of A and B. Out: what `spectrum` gives, in a few megabytes of memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lora_probe.spectrum import Spectrum, spectrum_of_grams
from lora_probe.weights import TensorHeader, WeightsFile, stretch, widen

Double = npt.NDArray[np.float64]

LARGE = 2**24
"""Values of A and B together that are held at once: 64 MiB as float32. Real pairs are smaller by far."""
BLOCK = 2**20
"""Values of a block."""
MOST_RANK = 4096
"""A rank whose Gram matrices still fit: 128 MiB each."""


def spectrum_in_blocks(file: WeightsFile, a: TensorHeader, b: TensorHeader, scaling: float) -> Spectrum | None:
    """`a: [r, in]`, `b: [out, r]`. None where the rank is absurd."""
    rank = a.shape[0]
    if rank > MOST_RANK:
        return None
    gram_a, gram_b = np.zeros((rank, rank)), np.zeros((rank, rank))
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _columns(file, a):
            gram_a += block @ block.T
        for block in _rows(file, b):
            gram_b += block.T @ block
    return spectrum_of_grams(gram_a, gram_b, scaling)


def _columns(file: WeightsFile, tensor: TensorHeader) -> Iterator[Double]:
    """Blocks `[rows, some columns]` of a matrix that lies row by row."""
    rows, columns = tensor.shape
    width = max(1, BLOCK // rows)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        parts = [stretch(file, tensor, row * columns + start, row * columns + stop) for row in range(rows)]
        yield np.stack([widen(part, tensor.dtype) for part in parts]).astype(np.float64)


def _rows(file: WeightsFile, tensor: TensorHeader) -> Iterator[Double]:
    rows, columns = tensor.shape
    height = max(1, BLOCK // columns)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        values = stretch(file, tensor, start * columns, stop * columns)
        yield widen(values, tensor.dtype).reshape(stop - start, columns).astype(np.float64)
