"""The difference between the weights that an engine holds and those in the file.

In: two torch tensors of one dtype, the live one and the one expected from the file. Out: their relative difference, if
any.
"""

from __future__ import annotations

from typing import Any


def relative_difference(held: Any, wanted: Any) -> float | None:
    """The relative difference of the live tensor and the expected one; None if they are the same bit for bit (NaN
    equals NaN), infinity if their shapes differ."""
    if held.shape != wanted.shape:
        return float("inf")
    if not (held.nan_to_num() != wanted.nan_to_num()).any():
        return None
    return float((wanted.float() - held.float()).norm() / wanted.float().norm().clamp(min=1e-30))
