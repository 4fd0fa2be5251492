"""Comparisons of two traces.

In: two `Trace`s. Out: the first divergence of their contributions (`contributions`) and of their modules' outputs
(`outputs`), and how much of an adapter's effect survives a merge (`effect`).
"""

from __future__ import annotations

from lora_probe.comparison.contributions import Comparison
from lora_probe.comparison.counterparts import Comparisons, compare, compare_each

__all__ = [
    "Comparison",
    "Comparisons",
    "compare",
    "compare_each",
]
