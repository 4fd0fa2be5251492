"""The rows on which `agrees` is measured: the first few of each request and phase.

In: the requests and phases of a step's rows. Out: the numbers of the sampled rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_probe.recording import DECODE, PREFILL

SAMPLED = {PREFILL: 4, DECODE: 2}
"""How many rows of each request are sampled, by phase."""


class Sampler:
    """Remembers how many rows of each request and phase were sampled."""

    REMEMBERED = 4096

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], int] = {}

    def pick(self, requests: Sequence[str], phases: Sequence[int]) -> list[int]:
        """Row numbers of one step. `requests` and `phases` describe its rows."""
        picked = []
        for number, at in enumerate(zip(requests, phases, strict=True)):
            taken = self._taken.get(at, 0)
            if taken < SAMPLED[at[1]]:
                self._taken[at] = taken + 1
                picked.append(number)
        while len(self._taken) > self.REMEMBERED:
            # The oldest requests have long ended.
            del self._taken[next(iter(self._taken))]
        return picked
