"""The work of `check`: adapters judged before anything runs.

In: folders and options. Out: a `Report` for each adapter.
"""

from __future__ import annotations

from lora_probe.checking.report import NotRun, Report

__all__ = [
    "NotRun",
    "Report",
]
