"""Which events of the load timeline are written: a server that loads adapters for months must not fill the disk.

In: events and loads in the order in which they happen. Out: the events to write. Each step on each module is written
for the first load of an adapter's name. Of later loads one line for each stage sums the modules up. All of them
together have at most 2·MAX_BYTES; loads, modules and stations are not part of the timeline and are always written.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from lora_probe.recording.records import Load, LoadEvent

MOST_NAMES = 256
"""Names of adapters whose first load has every step. A server that gives each load a name of its own has more."""
MAX_BYTES = 8_000_000
"""Events beyond this are only counted, except those of URGENT, which have as much again."""
URGENT = ("probe", "lost", "refused")


@dataclass
class _Sum:
    """The steps of one stage that share a line."""

    at: float
    modules: int = 0
    seconds: float = 0.0

    def event(self, stage: str) -> LoadEvent:
        text = f"{self.modules} modules; each is listed for the first load of this adapter"
        return LoadEvent(self.at, stage, text, seconds=round(self.seconds, 6), facts={"modules": self.modules})


class Timeline:
    """The state of one recording's timeline."""

    def __init__(self) -> None:
        self.dropped = 0
        self._names: set[str] = set()
        self._newest = -1
        self._in_detail = True
        self._sums: dict[str, _Sum] = {}
        self._size = 0

    def loading(self, load: Load) -> list[LoadEvent]:
        """A record of a load was written. Returns what is still to be written about the one before."""
        if load.load > self._newest:
            self._newest = load.load
            self._in_detail = load.name not in self._names and len(self._names) < MOST_NAMES
            if self._in_detail:
                self._names.add(load.name)
        elif load.slot is not None or load.refused:
            # It is in its slot: from here on the same steps are repeated each time it gets another one.
            self._in_detail = False
        return self.rest()

    def admitted(self, event: LoadEvent) -> list[LoadEvent]:
        """The events that are to be written now."""
        if event.module and not self._in_detail:
            steps = self._sums.setdefault(event.stage, _Sum(event.at))
            steps.modules += 1
            steps.seconds += event.seconds or 0.0
            return []
        return [*self.rest(), *self._within_bound(event)]

    def rest(self) -> list[LoadEvent]:
        """The sums of the steps that were not written one by one."""
        sums, self._sums = self._sums, {}
        return [event for stage, steps in sums.items() for event in self._within_bound(steps.event(stage))]

    def _within_bound(self, event: LoadEvent) -> list[LoadEvent]:
        limit = MAX_BYTES * (1 + (event.stage in URGENT))
        size = len(msgspec.json.encode(event)) + 1
        if self._size + size > limit:
            self.dropped += 1
            return []
        self._size += size
        return [event]
