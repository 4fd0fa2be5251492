"""Comparisons of two traces.

In: two `Trace`s. Out: the first divergence of their contributions (`contributions`) and of their modules' outputs
(`outputs`), and how much of an adapter's effect survives a merge (`effect`).
"""

from __future__ import annotations

from lora_probe.comparison.contributions import Comparison, compare

__all__ = [
    "Comparison",
    "compare",
]
