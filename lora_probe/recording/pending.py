"""Rows that wait for their segment, one buffer for each load and one for rows without any.

In: the parts of each step (`parts.py`). Out: the rows of whole segments, and whether it is time to write them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lora_probe.recording.parts import Part
from lora_probe.recording.placed import Placed, same_loads
from lora_probe.recording.rows import ARRAYS, Rows, concatenate

MAX_ROWS, MAX_BYTES = 4096, 64_000_000
"""The segments close when all buffers together have this many rows or bytes."""
IDLE_STEPS, IDLE_SECONDS = 4, (0.02, 1.0)
"""An engine is idle after the time of this many steps, within these bounds."""
BETWEEN_PARTS = 0.001
"""The parts of one step come one after the other in less than this."""


def segment_bytes(bound: int | None) -> int:
    """The bytes at which segments close if the recording has a bound: it has room for several of them."""
    return MAX_BYTES if bound is None else min(MAX_BYTES, bound // 8)


@dataclass
class _Buffer:
    parts: list[Rows] = field(default_factory=list)
    placed: dict[int, Placed] = field(default_factory=dict)

    def accepts(self, rows: Rows) -> bool:
        """Whether the rows fit into the same segment: it has one table of modules, one level, and one G for each of its
        loads at each of them."""
        if not self.parts:
            return True
        last = self.parts[-1]
        return last.modules == rows.modules and _level(last) == _level(rows) and same_loads(self.placed, rows.placed)


class Pending:
    """All buffers of one recording. It is true if there are rows in any."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffers: dict[int, _Buffer] = {}
        self._rows = self._bytes = 0
        self._first = self._last = self._between = 0.0

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def full(self) -> bool:
        return self._rows >= MAX_ROWS or self._bytes >= self._max_bytes

    def due(self, seconds: float) -> bool:
        """Whether the oldest rows have waited for `seconds`."""
        return bool(self) and time.monotonic() - self._first >= seconds

    @property
    def idle(self) -> bool:
        """Whether the engine seems to have nothing to do: it has not run a step for longer than several usual ones."""
        shortest, longest = IDLE_SECONDS
        return bool(self) and time.monotonic() - self._last >= min(max(shortest, IDLE_STEPS * self._between), longest)

    def add(self, part: Part) -> list[Rows]:
        """Add rows. Returns the rows of the segments that must be closed before."""
        buffer = self._buffers.setdefault(part.load, _Buffer())
        closed = [] if buffer.accepts(part.rows) else [self._take(part.load)]
        buffer = self._buffers.setdefault(part.load, _Buffer())
        buffer.parts.append(part.rows)
        buffer.placed |= part.rows.placed
        now = time.monotonic()
        if not self._rows:
            self._first = now
        if BETWEEN_PARTS < now - self._last < IDLE_SECONDS[1]:
            # Not a pause in which there was nothing to do.
            self._between = now - self._last
        self._last = now
        self._rows += len(part.rows)
        self._bytes += part.rows.nbytes
        return closed

    def taken(self) -> list[Rows]:
        """The rows of a segment for each load, which no longer wait."""
        return [self._take(load) for load in list(self._buffers)]

    def _take(self, load: int) -> Rows:
        parts = self._buffers.pop(load).parts
        self._rows -= sum(map(len, parts))
        self._bytes -= sum(part.nbytes for part in parts)
        return concatenate(parts)


def _level(rows: Rows) -> tuple[bool, ...]:
    """Which columns the level of detail keeps."""
    return tuple(getattr(rows, name) is not None for name in ARRAYS)
