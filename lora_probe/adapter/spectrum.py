"""The low-rank arithmetic of ΔW = s·B·A, without ever forming it.

In: `A: [r, in]`, `B: [out, r]`, the scaling `s`. Out: the singular values of ΔW from two r×r Gram matrices, and
from them the Frobenius norm and the effective rank (Roy and Vetterli, 2007: exp of the entropy of the normalised
singular values).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from lora_probe.adapter.checkpoint import Adapter, AdapterModule
from lora_probe.adapter.pair_values import is_stored_whole, pair_values
from lora_probe.errors import UnreadableFile
from lora_probe.files import shown
from lora_probe.files.limits import step
from lora_probe.files.threads import on_all_processors
from lora_probe.files.values import Scratch, read_chunk, read_half, widen
from lora_probe.files.weights import TensorHeader, WeightsFile

Array = npt.NDArray[np.float32]

FLOAT32_FLOOR = 1e-3
"""float32 Gram matrices resolve singular values down to this share of the largest; below it, float64 is used."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of s·B·A, largest first, with norm and effective rank. All are NaN if A or B is not finite."""

    singular: npt.NDArray[np.float64]
    norm: float
    effective_rank: float

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.norm))


def spectrum(a: Array, b: Array, scaling: float) -> Spectrum:
    """The spectrum of `scaling * b @ a`. `a: [r, in]`, `b: [out, r]`.

    With G_A = A·Aᵀ = L·Lᵀ and G_B = Bᵀ·B the squares of the singular values of B·A are the eigenvalues of Lᵀ·G_B·L, an
    r×r matrix: `O((in + out)·r²)` instead of an SVD of `[out, in]`.
    """
    singular = _singular(a, b)
    # The norm of a value that is not finite is not finite either, so only then all have to be looked at.
    if not np.isfinite(singular).all() and not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Spectrum(np.full(a.shape[0], np.nan), float("nan"), float("nan"))
    if (singular.size and 0 < singular[-1] < FLOAT32_FLOOR * singular[0]) or not np.isfinite(singular).all():
        singular = _singular(a.astype(np.float64), b.astype(np.float64))
    singular = singular * abs(scaling)
    norm = float(np.sqrt(np.square(singular).sum()))
    return Spectrum(singular, norm, effective_rank(singular))


def spectrum_of_grams(gram_a: npt.NDArray[np.float64], gram_b: npt.NDArray[np.float64], scaling: float) -> Spectrum:
    """The spectrum from `A·Aᵀ` and `Bᵀ·B`, both `[r, r]`, without A and B themselves."""
    singular = _of_grams(gram_a, gram_b) * abs(scaling)
    return Spectrum(singular, float(np.sqrt(np.square(singular).sum())), effective_rank(singular))


def _singular(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    rank, least = a.shape[0], min(a.shape[1], b.shape[0])
    with np.errstate(over="ignore", invalid="ignore"):
        if rank > least:
            # An r×r matrix would be larger than A and B; their product is smaller than the larger of them.
            product = b.astype(np.float64) @ a
            if not np.isfinite(product).all():
                return np.full(rank, np.nan)
            singular = np.zeros(rank)
            singular[:least] = _roots(product @ product.T if b.shape[0] == least else product.T @ product)
            return singular
        return _of_grams((a @ a.T).astype(np.float64), (b.T @ b).astype(np.float64))


def _of_grams(gram_a: npt.NDArray[np.float64], gram_b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if not (np.isfinite(gram_a).all() and np.isfinite(gram_b).all()):
        return np.full(len(gram_a), np.nan)
    root = _root(gram_a)
    with np.errstate(over="ignore", invalid="ignore"):
        return _roots(root.T @ gram_b @ root)


def _root(gram: npt.NDArray[np.float64]) -> npt.NDArray[np.floating]:
    """L `[r, r]` with L·Lᵀ = `gram`. Cholesky's takes a twentieth of the time of the other one, and does not exist if A
    has dependent rows."""
    try:
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        root: npt.NDArray[np.floating] = vectors * np.sqrt(values.clip(0))
        return root


def _roots(squares: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """The square roots of the eigenvalues of a Gram matrix, largest first."""
    result: npt.NDArray[np.float64] = np.sqrt(np.linalg.eigvalsh(squares).clip(0))[::-1]
    return result


def effective_rank(singular: npt.NDArray[np.float64]) -> float:
    """exp(entropy) of the singular values as shares of their sum; 0 if all are zero."""
    total = singular.sum()
    if not total > 0:
        return 0.0
    shares = singular[singular > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def gram(b: Array, scaling: float = 1.0) -> Array:
    """G = (s·B)ᵀ(s·B): `[r, r]`. With it ‖delta‖² of a row is shrink·G·shrinkᵀ."""
    scaled = b * np.float32(scaling)
    product: Array = scaled.T @ scaled
    return product


def delta_norms(shrink: npt.NDArray[np.float32], g: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """‖delta‖ of every row. `shrink: [..., r]`, `g: [r, r]` -> `[...]`."""
    squares = ((shrink @ g) * shrink).sum(-1)
    result: npt.NDArray[np.float32] = np.sqrt(squares.clip(0)).astype(np.float32)
    return result


Double = npt.NDArray[np.float64]

LARGE = 2**24
"""Most values of A and B together that are in memory at once: 64 MiB as float32. Real pairs are far smaller."""
BLOCK = 2**20
"""Values of a block."""
MOST_RANK = 4096
"""The highest rank whose Gram matrices are computed: 128 MiB each."""


def spectrum_in_blocks(file: WeightsFile, a: TensorHeader, b: TensorHeader, scaling: float) -> Spectrum | None:
    """The spectrum of `a: [r, in]`, `b: [out, r]`, read in blocks. None above MOST_RANK."""
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
    """Blocks `[rows, some columns]` of a matrix that is stored row by row."""
    rows, columns = tensor.shape
    width = max(1, BLOCK // rows)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        parts = [read_chunk(file, tensor, row * columns + start, row * columns + stop) for row in range(rows)]
        yield np.stack([widen(part, tensor.dtype) for part in parts]).astype(np.float64)


def _rows(file: WeightsFile, tensor: TensorHeader) -> Iterator[Double]:
    rows, columns = tensor.shape
    height = max(1, BLOCK // columns)
    for start in range(0, rows, height):
        stop = min(start + height, rows)
        values = read_chunk(file, tensor, start * columns, stop * columns)
        yield widen(values, tensor.dtype).reshape(stop - start, columns).astype(np.float64)


def pair_spectrum(adapter: Adapter, pair: AdapterModule, scratch: Scratch | None = None) -> Spectrum | None:
    """The spectrum of a pair; None if A and B are not a pair of matrices or of kernels."""
    if pair.a is None or pair.b is None or not (pair.matrices or pair.convolution):
        return None
    step(f"computing ‖ΔW‖ of {shown(pair.stored_as)}", adapter.weights.path)
    a, b = _as_matrix(pair.a), _as_matrix(pair.b)
    try:
        if not is_stored_whole(adapter, pair):
            if not pair.matrices:
                return None
            large = pair.blocks[0] * a.parameters + pair.blocks[1] * b.parameters > LARGE
            return None if large else spectrum(*pair_values(adapter, pair), pair.scaling)
        if a.parameters + b.parameters > LARGE:
            return spectrum_in_blocks(adapter.weights, a, b, pair.scaling)
        scratch = scratch or Scratch()
        halves = [read_half(adapter.weights, half, name, scratch) for half, name in ((a, "A"), (b, "B"))]
        return spectrum(halves[0], halves[1], pair.scaling)
    except UnreadableFile:
        return None


def _as_matrix(tensor: TensorHeader) -> TensorHeader:
    """A kernel with all axes but the first as one: ΔW of a convolution is the product of these."""
    return replace(tensor, shape=(tensor.shape[0], math.prod(tensor.shape[1:])))


def spectra_of(adapter: Adapter, advance: Callable[[], None] = lambda: None) -> dict[str, Spectrum | None]:
    """The spectrum of every module by its name in the file; None if A and B do not form a pair. `advance` is called
    after each module."""
    spectra = {}
    of_each = on_all_processors(partial(pair_spectrum, adapter, scratch=Scratch()), adapter.modules)
    for module, of_one in zip(adapter.modules, of_each, strict=True):
        spectra[module.stored_as] = of_one
        advance()
    return spectra
