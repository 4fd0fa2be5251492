"""The rows on which `agrees` is measured: the first few of each request and phase.

In: the requests and phases of a step's rows, and the load of each request. Out: the numbers of the sampled rows. A
server may run millions of requests, so after the first ones of a load only some are sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from lora_probe.recording import DECODE, PREFILL

SAMPLED = {PREFILL: 4, DECODE: 2}
"""How many rows of each request are sampled, by phase."""

ALL_REQUESTS, ONE_IN = 64, 64
"""The first requests of a load are all sampled, later ones one in so many."""

Run = tuple[str, int, int, int]
"""Consecutive rows of one request and phase: request, phase, number of the first row, how many."""


class Sampler:
    """Remembers how many rows of each request and phase were sampled."""

    REMEMBERED = 4096

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], int] = {}
        self._seen: dict[int, int] = {}
        self._admitted: dict[str, bool] = {}

    def admits(self, request: str, load: int) -> bool:
        """Whether a request for a load is one of those that are sampled. The answer stays the same for a request."""
        if request not in self._admitted:
            count = self._seen[load] = self._seen.get(load, 0) + 1
            self._admitted[request] = count <= ALL_REQUESTS or count % ONE_IN == 0
            _forget(self._admitted, self.REMEMBERED)
        return self._admitted[request]

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
        _forget(self._taken, self.REMEMBERED)
        return picked


def _forget(answers: dict[Any, Any], most: int) -> None:
    """The oldest requests have long ended."""
    while len(answers) > most:
        del answers[next(iter(answers))]


def _runs(requests: Sequence[str], phases: Sequence[int]) -> Iterator[Run]:
    first = 0
    for (request, phase), rows in groupby(zip(requests, phases, strict=True)):
        count = sum(1 for _ in rows)
        yield request, phase, first, count
        first += count
