"""The rows on which `agrees` is measured: the first few of each request and phase.

In: the requests and phases of a step's rows. Out: the numbers of the sampled rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from lora_probe.recording import DECODE, PREFILL

SAMPLED = {PREFILL: 4, DECODE: 2}
"""How many rows of each request are sampled, by phase."""

Run = tuple[str, int, int, int]
"""Consecutive rows of one request and phase: request, phase, number of the first row, how many."""


class Sampler:
    """Remembers how many rows of each request and phase were sampled."""

    REMEMBERED = 4096

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], int] = {}

    def pick(self, requests: Sequence[str], phases: Sequence[int]) -> list[int]:
        """Row numbers of one step. `requests` and `phases` describe its rows."""
        return self.pick_runs(_runs(requests, phases))

    def pick_runs(self, runs: Iterable[Run]) -> list[int]:
        """The same for rows that are already grouped."""
        picked: list[int] = []
        for request, phase, first, count in runs:
            at = request, phase
            taken = self._taken.get(at, 0)
            if taken < SAMPLED[phase]:
                count = min(count, SAMPLED[phase] - taken)
                self._taken[at] = taken + count
                picked += range(first, first + count)
        while len(self._taken) > self.REMEMBERED:
            # The oldest requests have long ended.
            del self._taken[next(iter(self._taken))]
        return picked


def _runs(requests: Sequence[str], phases: Sequence[int]) -> Iterator[Run]:
    first = 0
    for (request, phase), rows in groupby(zip(requests, phases, strict=True)):
        count = sum(1 for _ in rows)
        yield request, phase, first, count
        first += count
