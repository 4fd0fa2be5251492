"""Two traces held against each other.

In: two `Trace`s. Out: where their contributions first differ (`contributions`), where their modules' outputs do
(`outputs`), and how much of an adapter's effect survives a merge (`effect`).
"""

from __future__ import annotations

from lora_probe.comparison.contributions import Comparison, compare

__all__ = [
    "Comparison",
    "compare",
]
