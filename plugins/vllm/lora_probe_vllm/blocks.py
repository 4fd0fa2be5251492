"""Which load computed each block of the KV cache, and how each request was served.

In: the scheduler's output of every step, and the active loads. Out: for each running request how many positions came
from the prefix cache, the loads that computed them, and whether their weights were others than those of its own load.

Only the scheduler's output is read, which is the same for both model runners. A block belongs to the load whose rows
were computed in it last. Blocks of requests that ran before the recording began are unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from lora_probe.recording import Served
from lora_probe.recording.rows import NO_ADAPTER, NOT_IN_ITS_SLOT
from lora_probe_vllm.seams import Scheduled, scheduled

UNKNOWN = -1
"""The author of a block that was not seen."""


class Author(NamedTuple):
    """Who computed a block: the number of a load, and the digest of its weights at that time; "" if it is unknown."""

    load: int
    digest: str = ""


BASE, STALE = Author(NO_ADAPTER), Author(NOT_IN_ITS_SLOT)


@dataclass
class Running:
    """A request from its first step until it ends. Its rows are at the positions from `low` to `high`, those of the
    current step not included; `step` are the first and the last position (exclusive) of that step. `other_weights`: how
    many cached positions were computed with other weights."""

    id: str
    served: Served
    adapter: int | None = None
    blocks: list[int] = field(default_factory=list)
    low: int = 0
    high: int = 0
    step: tuple[int, int] = (0, 0)
    other_weights: int = 0
    author: int = UNKNOWN

    def advance(self, start: int, count: int) -> None:
        """The next step has the positions from `start` on."""
        before, end = self.step
        if end and start > end:
            # The steps in between were not followed.
            end = start
        self.low = min(self.low, before) if self.high else before
        self.high = max(self.high, end)
        self.step = start, start + count


class Blocks:
    """The running requests and the authors of all blocks, from the first step of a recording on. `size` is the number
    of positions in a block; None if authors cannot be known. `keeps_tokens`: also the tokens of prompts."""

    def __init__(self, size: int | None, keeps_tokens: bool = False) -> None:
        self._size, self._keeps_tokens = size, keeps_tokens
        self._authors: dict[Author, int] = {}
        self._names: list[Author] = []
        self._author_of: npt.NDArray[np.int32] = np.full(1024, UNKNOWN, np.int32)
        self.running: dict[str, Running] = {}

    def step(self, scheduler_output: Any, loads: Mapping[int, Author], only_new_blocks: bool = False) -> list[Running]:
        """One step that has run. `loads` are the active ones by vLLM's adapter id. Returns the requests that began.

        With `only_new_blocks`, requests whose block tables do not change are not followed in this step: enough where
        its rows are not recorded.
        """
        for request in scheduler_output.finished_req_ids:
            self.running.pop(request, None)
        began = []
        numbers = {adapter: self._number(author) for adapter, author in loads.items()} | {0: self._number(BASE)}
        for part in scheduled(scheduler_output, only_new_blocks):
            running = self.running.get(part.request)
            begins = running is None and part.prompt is not None
            if running is None:
                ids = list(part.tokens) if self._keeps_tokens and part.tokens is not None else None
                served = Served(part.prompt or 0, part.start if begins else 0, prompt_ids=ids)
                running = self.running[part.request] = Running(part.request, served, part.adapter)
            elif part.whole:
                running.served = replace(running.served, preemptions=running.served.preemptions + 1)
            running.advance(part.start, part.rows)
            if self._size is not None and len(part.blocks) <= 1:
                self._note_blocks(part, running, self._size, numbers, begins)
            if begins:
                began.append(running)
        return began

    def rows_of(self, adapter: int, scheduler_output: Any) -> dict[str, int]:
        """How many rows of the current step each request for an adapter has."""
        rows = scheduler_output.num_scheduled_tokens
        return {name: rows[name] for name in rows if name in self.running and self.running[name].adapter == adapter}

    def _note_blocks(
        self, part: Scheduled, running: Running, size: int, numbers: Mapping[int, int], begins: bool
    ) -> None:
        """Who computes the blocks of this step. `numbers` are those of the authors by adapter."""
        if part.blocks:
            running.blocks = [*(() if part.whole else running.blocks), *part.blocks[0]]
        if running.adapter is None:
            # It ran before the recording began: where its new blocks are in its table is not known.
            self._write(running.blocks, UNKNOWN)
            return
        number = numbers[running.adapter] if running.adapter in numbers else self._number(STALE)
        if begins:
            self._note_cached(part.start, running, size, self._names[number])
        # A block is only shared when it is full, so it is enough to note the author of its first row.
        if part.rows > 1 or part.start % size == 0 or number != running.author:
            last = part.start + part.rows
            self._write(running.blocks[part.start // size : -(-last // size)], number)
            running.author = number

    def _note_cached(self, cached: int, running: Running, size: int, author: Author) -> None:
        """Who computed the positions that a request did not have to compute."""
        blocks = np.array(running.blocks[: -(-cached // size)], np.int64)
        sizes = np.diff(np.minimum(np.arange(1, len(blocks) + 1) * size, cached), prepend=0)
        # Block 0 stands for one that is not needed any more (behind a sliding window).
        needed = blocks != 0
        self._grow(int(blocks.max(initial=0)))
        numbers = self._author_of[blocks[needed]].tolist()
        authors = [self._names[number] for number in numbers if number != UNKNOWN]
        if len(authors) == len(numbers):
            loads = list(dict.fromkeys(other.load for other in authors))
            running.served = replace(running.served, cached_loads=loads)
        if author.digest:
            other = [number != UNKNOWN and self._names[number].digest != author.digest for number in numbers]
            running.other_weights = int(sizes[needed][other].sum())

    def _write(self, blocks: list[int], number: int) -> None:
        if blocks:
            self._grow(max(blocks))
            self._author_of[blocks] = number

    def _grow(self, block: int) -> None:
        if block >= len(self._author_of):
            wider = np.full(2 * (block + 1), UNKNOWN, np.int32)
            wider[: len(self._author_of)] = self._author_of
            self._author_of = wider

    def _number(self, author: Author) -> int:
        number = self._authors.setdefault(author, len(self._names))
        if number == len(self._names):
            self._names.append(author)
        return number
