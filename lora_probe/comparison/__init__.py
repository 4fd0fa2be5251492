"""Comparisons of two traces.

In: two `Trace`s. Out: where and why their contributions differ (`contributions`, `causes`), the first divergence of
their modules' outputs (`outputs`), and how much of an adapter's effect survives a merge (`effect`).
"""

from __future__ import annotations

from lora_probe.comparison.compared import Cause, Comparison
from lora_probe.comparison.counterparts import Comparisons, compare, compare_each

__all__ = [
    "Cause",
    "Comparison",
    "Comparisons",
    "compare",
    "compare_each",
]
