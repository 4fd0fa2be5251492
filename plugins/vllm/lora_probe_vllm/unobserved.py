"""Rows of steps that are not observed: because they replay captured graphs or run compiled code, where no Python sees
the layers, or because only a sample of the steps is wanted.

In: the requests of such a step, and vLLM's own table from tokens to slots when the step has been started. Out: how many
rows of each load were not observed, and of how many the table named another slot than that of the row's adapter. The
table is compared on its device, so that nothing waits for it before the counts are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SECONDS = 60.0
"""How often the counts of a running engine are written."""
MOST_SLOTS = 4096
"""More than the adapters that an engine has slots for (`--max-loras`)."""
NO_SLOT = -1
"""In vLLM's table: a row without an adapter."""


@dataclass
class Passed:
    """Of one load: its rows that were not observed, and those of them that were sent to another slot."""

    compiled: bool
    rows: int = 0
    wrong: int = 0

    @property
    def text(self) -> str:
        mapping = (
            "their mapping to the slot was right"
            if not self.wrong
            else f"{self.wrong} of them were mapped to another slot"
        )
        how = "ran in captured graphs or compiled code and were" if self.compiled else "were in steps that are"
        return f"{self.rows} rows {how} not observed; {mapping}"


class Unobserved:
    """Counts by the number of a load. `take` returns what has changed since it was last called. `compiled`: the engine
    compiles its model or replays graphs."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self.passed: dict[int, Passed] = {}
        self._slots: dict[int, int] = {}
        self._wrong: torch.Tensor | None = None
        self._changed: set[int] = set()
        self._taken = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether something has changed, and nothing was taken for SECONDS."""
        return bool(self._changed) and time.monotonic() - self._taken >= SECONDS

    def add(
        self,
        lora: npt.NDArray[Any],
        counts: npt.NDArray[Any],
        loads: Mapping[int, tuple[int, int]],
        table: torch.Tensor,
    ) -> None:
        """One step. `lora` and `counts` are the adapter id and the number of rows of each request, in the order of the
        batch; `loads` has for each adapter id the number of its load and its slot; `table: [rows]` is vLLM's slot of
        each row on its device."""
        slots = np.full(len(lora), NO_SLOT, np.int64)
        for adapter, (load, slot) in loads.items():
            own = lora == adapter
            if not own.any():
                continue
            if self._slots.get(slot, load) != load:
                # Another load has the slot now: what was counted there belongs to the one before.
                self._attribute()
            self._slots[slot] = load
            slots[own] = slot
            self.passed.setdefault(load, Passed(self.compiled)).rows += int(counts[own].sum())
            self._changed.add(load)
        if (slots == NO_SLOT).all():
            return
        expected = torch.from_numpy(np.repeat(slots, counts)).to(table.device, non_blocking=True)
        if self._wrong is None:
            self._wrong = torch.zeros(1 + MOST_SLOTS, dtype=torch.int64, device=table.device)
        self._wrong.index_add_(0, expected + 1, (table != expected).long())

    def take(self) -> dict[int, Passed]:
        """The loads whose counts have changed. It waits for the device."""
        self._attribute()
        changed, self._changed = self._changed, set()
        self._taken = time.monotonic()
        return {load: self.passed[load] for load in sorted(changed)}

    def _attribute(self) -> None:
        """Add the wrong rows of each slot to its load, and begin anew."""
        if self._wrong is None:
            return
        wrong = self._wrong.tolist()
        for slot, load in self._slots.items():
            self.passed[load].wrong += wrong[slot + 1]
        self._wrong, self._slots = None, {}
