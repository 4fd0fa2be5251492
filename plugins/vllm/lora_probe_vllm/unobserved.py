"""Rows of steps that replayed captured graphs or ran compiled code, where no Python sees the layers.

In: the rows of such a step, and vLLM's own tables when it has been started. Out: how many rows of each load were not
observed, and of how many the table from tokens to slots named another slot than that of the row's adapter. The tables
are compared on their device, so that nothing waits for it before the counts are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lora_probe_vllm.rows import StepRows

SECONDS = 60.0
"""How often the counts of a running engine are written."""


@dataclass
class Passed:
    """Of one load: its rows that were not observed, and those of them that were sent to another slot."""

    rows: int = 0
    wrong: int = 0

    @property
    def text(self) -> str:
        mapping = (
            "their mapping to the slot was right"
            if not self.wrong
            else f"{self.wrong} of them were mapped to another slot"
        )
        return f"{self.rows} rows ran in captured graphs or compiled code and were not observed; {mapping}"


class Unobserved:
    """Counts by the number of a load. `take` returns what has changed since it was last called."""

    def __init__(self) -> None:
        self.passed: dict[int, Passed] = {}
        self._wrong: dict[int, torch.Tensor] = {}
        self._changed: set[int] = set()
        self._taken = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether something has changed, and nothing was taken for SECONDS."""
        return bool(self._changed) and time.monotonic() - self._taken >= SECONDS

    def add(self, rows: StepRows, slots: Mapping[int, tuple[int, int]], table: torch.Tensor) -> None:
        """One step. `slots` has for each adapter id the number of its load and its slot; `table: [rows]` is vLLM's slot
        of each row on its device."""
        lora = np.asarray(rows.lora)
        for adapter, (load, slot) in slots.items():
            (own,) = np.nonzero(lora == adapter)
            if not len(own):
                continue
            self.passed.setdefault(load, Passed()).rows += len(own)
            self._changed.add(load)
            index = torch.from_numpy(own).to(table.device, non_blocking=True)
            wrong = (table[index] != slot).sum()
            self._wrong[load] = self._wrong[load] + wrong if load in self._wrong else wrong

    def take(self) -> dict[int, Passed]:
        """The loads whose counts have changed. It waits for the device."""
        for load in self._changed:
            self.passed[load].wrong = int(self._wrong[load])
        changed, self._changed = self._changed, set()
        self._taken = time.monotonic()
        return {load: self.passed[load] for load in sorted(changed)}
