"""How two low-rank matrices ΔW = s·B·A are related, without ever forming them.

In: A `[r, in]` and B `[out, r]` of both, with their scalings; the ranks may differ. Out: a `Relation`: cosine, factor,
distance, and the principal angles between their row spaces and between their column spaces, all from Gram matrices
of rank × rank (Björck and Golub, 1973, for the angles).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.adapter.spectrum import Array, Double

JUDGED = 0.25
"""Two subspaces of which random ones would share more than this are not judged."""
CUT = 1e-10
"""Directions of a Gram matrix with less than this share of its largest eigenvalue are taken as rounding."""


@dataclass(frozen=True)
class Relation:
    """Two products ΔW₁ and ΔW₂ of the same shape. `norms` are ‖ΔW₁‖ and ‖ΔW₂‖, `inner` is ⟨ΔW₁, ΔW₂⟩; `start` is the
    cosine of both A as vectors, None if their ranks differ.

    `rows` and `columns` are the cosines of the principal angles between the row spaces of both A and between the column
    spaces of both B, the largest first. `chance` is the mean of cos² that two random A, and two random B, would have.
    """

    norms: tuple[float, float]
    inner: float
    start: float | None
    rows: Double
    columns: Double
    chance: tuple[float, float]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite([*self.norms, self.inner]).all())

    @property
    def cosine(self) -> float | None:
        """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖·‖ΔW₂‖); None if one of them is zero, or not a number."""
        return _cosine(self.inner, *self.norms)

    @property
    def factor(self) -> float | None:
        """The f for which ‖ΔW₂ - f·ΔW₁‖ is smallest; None if ΔW₁ is zero."""
        square = self.norms[0] ** 2
        return self.inner / square if square else None

    @property
    def distance(self) -> float:
        """‖ΔW₂ - ΔW₁‖."""
        one, two = self.norms
        return float(np.sqrt(max(0.0, one**2 + two**2 - 2 * self.inner)))

    @property
    def rest(self) -> float:
        """‖ΔW₂ - f·ΔW₁‖ / ‖ΔW₂‖ for the best factor f: 0 if one is a multiple of the other."""
        cosine = self.cosine
        return 1.0 if cosine is None else float(np.sqrt(max(0.0, 1 - cosine**2)))

    @property
    def shared_rows(self) -> float | None:
        """How far both A span the same rows, from 0 (as by chance) to 1; None if even random ones share most of it."""
        return _above_chance(self.rows, self.chance[0])

    @property
    def shared_columns(self) -> float | None:
        """The same for the columns of both B."""
        return _above_chance(self.columns, self.chance[1])


def relate(first: tuple[Array, Array, float], second: tuple[Array, Array, float]) -> Relation:
    """The relation of two `(A, B, scaling)` with the same `in` and `out`."""
    (a1, b1, s1), (a2, b2, s2) = ((a.astype(np.float64), b.astype(np.float64), s) for a, b, s in (first, second))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        of_a = a1 @ a1.T, a1 @ a2.T, a2 @ a2.T
        of_b = b1.T @ b1, b1.T @ b2, b2.T @ b2
        squares = [float((gram_a * gram_b).sum()) for gram_a, gram_b in zip(of_a, of_b, strict=True)]
        lengths = [_root(float(np.trace(gram))) for gram in (of_a[0], of_a[2])]
        start = _cosine(float(np.trace(of_a[1])), *lengths) if a1.shape == a2.shape else None
    norms = abs(s1) * _root(squares[0]), abs(s2) * _root(squares[2])
    rank = max(len(a1), len(a2))
    chance = rank / a1.shape[1], rank / b1.shape[0]
    return Relation(norms, s1 * s2 * squares[1], start, _cosines(*of_a), _cosines(*of_b), chance)


def _cosine(inner: float, one: float, two: float) -> float | None:
    if not (one and two and np.isfinite([inner, one, two]).all()):
        return None
    # One division after the other: the product of two small norms may be zero.
    return min(1.0, max(-1.0, inner / one / two))


def _root(square: float) -> float:
    return float(np.sqrt(max(square, 0.0))) if np.isfinite(square) else float("nan")


def _cosines(one: Double, both: Double, two: Double) -> Double:
    """The cosines of the principal angles between two subspaces, from the Gram matrices of their bases."""
    if not all(np.isfinite(gram).all() for gram in (one, both, two)):
        return np.zeros(0)
    left, right = _whitened(one), _whitened(two)
    if not left.shape[1] or not right.shape[1]:
        return np.zeros(0)
    cosines: Double = np.linalg.svd(left.T @ both @ right, compute_uv=False).clip(0, 1)
    return cosines


def _whitened(gram: Double) -> npt.NDArray[np.float64]:
    """`[r, k]`, with which `k` orthonormal vectors are made of the basis."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > CUT * max(float(values[-1]), 0.0) if len(values) else values > 0
    whitened: Double = vectors[:, kept] / np.sqrt(values[kept])
    return whitened


def _above_chance(cosines: Double, chance: float) -> float | None:
    if not len(cosines) or chance > JUDGED:
        return None
    return float(max(0.0, (np.square(cosines).mean() - chance) / (1 - chance)))
