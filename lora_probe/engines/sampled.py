"""Sums over the sampled rows of a module, by which its contribution is judged.

In: contributions of sampled rows, and what they should be. Out: `Counters`; their relative error, and the
factor by which all of them are off, if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_probe.recording import Floats

ENOUGH_ROWS = 4
"""With fewer sampled rows than this a relative error means little: x·A of a single row may cancel to almost zero."""


@dataclass
class Counters:
    """The counters of one module. `applied` counts the rows that requested the adapter and ran with it; of the sampled
    ones `error`, `reference`, `output` and `bound` are sums of squares, `product` is Σ⟨output, reference⟩."""

    applied: int = 0
    routed: int | None = None
    """How many of the rows that requested the adapter were meant for this module; None: all of them."""
    sampled: int = 0
    error: float = 0.0
    reference: float = 0.0
    output: float = 0.0
    width: int = 0
    product: float = 0.0
    worst_row: float = 0.0
    bound: float = 0.0
    finite: bool = True


def count(counters: Counters, delta: Floats, reference: Floats, size: Floats) -> None:
    """Add rows: `delta`, `reference` and what round-off is a share of, `[rows, out]` each."""
    counters.sampled += len(delta)
    if not (np.isfinite(delta).all() and np.isfinite(reference).all()):
        counters.finite = False
        return
    errors = np.linalg.norm(delta - reference, axis=-1)
    sizes = np.linalg.norm(reference, axis=-1)
    bound = np.linalg.norm(size, axis=-1)
    counters.bound += float(np.square(bound, dtype=np.float64).sum())
    counters.error += float(np.square(errors, dtype=np.float64).sum())
    counters.reference += float(np.square(reference, dtype=np.float64).sum())
    counters.width = delta.shape[-1]
    counters.output += float(np.square(delta, dtype=np.float64).sum())
    counters.product += float((delta.astype(np.float64) * reference).sum())
    rows = sizes > 0
    if rows.any():
        counters.worst_row = max(counters.worst_row, float((errors[rows] / sizes[rows]).max()))


def relative_error(counters: Counters) -> float:
    """Error over all sampled rows of a module; a zero reference with a non-zero delta is infinitely wrong."""
    if counters.reference == 0:
        return 0.0 if counters.error == 0 else float("inf")
    return float(np.sqrt(counters.error / counters.reference))


def common_factor(counters: Counters, limit: float) -> float | None:
    """By which factor the outputs of all sampled rows differ from their references; None if it is not one factor."""
    if not counters.reference or counters.width == 1 or counters.sampled < ENOUGH_ROWS:
        return None
    factor = counters.product / counters.reference
    return factor if abs(counters.output - factor * counters.product) <= limit**2 * counters.output else None
