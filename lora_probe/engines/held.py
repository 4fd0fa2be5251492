"""How far what an engine holds lies from what the file says.

In: two torch tensors of one dtype, the live one and a replay of the file's. Out: their relative difference, if any.
"""

from __future__ import annotations

from typing import Any


def relative_difference(held: Any, wanted: Any) -> float | None:
    """How far what an engine holds lies from a replay of the file, two torch tensors of one dtype; None where they are
    the same bit for bit (NaN for NaN), infinity where even their shapes differ."""
    if held.shape != wanted.shape:
        return float("inf")
    if not (held.nan_to_num() != wanted.nan_to_num()).any():
        return None
    return float((wanted.float() - held.float()).norm() / wanted.float().norm().clamp(min=1e-30))
