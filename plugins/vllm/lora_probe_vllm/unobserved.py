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
MOST_COMPARED = 1024
"""Comparisons that wait on the device, one for each change of the batch: a few kB each."""
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
        self._step: Any = None
        self._owners = np.empty(0, np.int64)
        self._rows: dict[int, int] = {}
        self._expected: torch.Tensor | None = None
        self._wrong = torch.empty(0, dtype=torch.int64)
        self._compared: list[tuple[torch.Tensor, npt.NDArray[Any]]] = []
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
        step = lora.tobytes(), counts.tobytes(), tuple(loads.items())
        if step != self._step:
            self._end()
            self._begin(step, lora, counts, loads, table.device)
        for load, rows in self._rows.items():
            self.passed.setdefault(load, Passed(self.compiled)).rows += rows
        self._changed |= self._rows.keys()
        if self._expected is not None:
            self._wrong.add_(table != self._expected)

    def _begin(
        self,
        step: Any,
        lora: npt.NDArray[Any],
        counts: npt.NDArray[Any],
        loads: Mapping[int, tuple[int, int]],
        device: torch.device,
    ) -> None:
        """The first of some steps with the same requests: while an engine only decodes, most steps are like the one
        before, and a comparison on the device is all that they need."""
        slots = np.full(len(lora), NO_SLOT, np.int64)
        owners = np.full(len(lora), NO_SLOT, np.int64)
        for adapter, (load, slot) in loads.items():
            slots[lora == adapter], owners[lora == adapter] = slot, load
        self._step = step
        self._owners = np.repeat(owners, counts)
        self._rows = {load: int(counts[owners == load].sum()) for load in np.unique(owners).tolist() if load >= 0}
        self._expected = None
        if self._rows:
            self._expected = torch.from_numpy(np.repeat(slots, counts)).to(device, non_blocking=True)
            self._wrong = torch.zeros(len(self._owners), dtype=torch.int64, device=device)

    def take(self) -> dict[int, Passed]:
        """The loads whose counts have changed. It waits for the device."""
        self._end()
        self._attribute()
        changed, self._changed = self._changed, set()
        self._taken = time.monotonic()
        return {load: self.passed[load] for load in sorted(changed)}

    def _end(self) -> None:
        """The next step has other requests. What was compared stays on the device, which nothing waits for here."""
        if self._expected is not None:
            self._compared.append((self._wrong, self._owners))
        self._step, self._expected, self._rows = None, None, {}
        if len(self._compared) > MOST_COMPARED:
            self._attribute()

    def _attribute(self) -> None:
        """Add the wrong rows to the loads that they belong to."""
        for on_device, owners in self._compared:
            wrong = on_device.cpu().numpy()
            for load in np.unique(owners[wrong > 0]).tolist():
                # -1: a row without an adapter that the table sends to a slot is measured elsewhere.
                if load >= 0:
                    self.passed[load].wrong += int(wrong[owners == load].sum())
        self._compared = []
