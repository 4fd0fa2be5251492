"""Which segments of a bounded recording are removed when a new one is added.

In: the size of each segment as it is written, and whether it is the first of its load. Out: the oldest segments beyond
the bound. The first segment of a load has its G and its first rows, so it is kept while all of these take up to half of
the bound; then the ones of the oldest loads are removed as well. Records in events.jsonl are never removed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SMALLEST = 2**15
"""A smaller segment counts as this many bytes. It bounds the number of files: 16,384 for 512 MiB."""


@dataclass(frozen=True)
class Entry:
    """A segment on disk."""

    path: Path
    rows: int
    size: int


class Ring:
    """The segments of one recording. `bound` is in bytes; None: nothing is removed."""

    def __init__(self, bound: int | None) -> None:
        self._bound = bound
        self._firsts: deque[Entry] = deque()
        self._others: deque[Entry] = deque()
        self._size_of_firsts = self._size_of_others = 0

    def add(self, path: Path, rows: int, size: int, first: bool) -> Iterator[Entry]:
        """Add a segment. Returns the segments that are to be removed, never the new one."""
        if self._bound is None:
            return
        entry = Entry(path, rows, max(size, SMALLEST))
        if first:
            self._firsts.append(entry)
            self._size_of_firsts += entry.size
        else:
            self._others.append(entry)
            self._size_of_others += entry.size
        while self._size_of_firsts > self._bound / 2 and self._firsts[0] is not entry:
            yield self._oldest_first()
        while self._size_of_firsts + self._size_of_others > self._bound:
            if self._others and self._others[0] is not entry:
                removed = self._others.popleft()
                self._size_of_others -= removed.size
                yield removed
            elif self._firsts and self._firsts[0] is not entry:
                yield self._oldest_first()
            else:
                return

    def _oldest_first(self) -> Entry:
        removed = self._firsts.popleft()
        self._size_of_firsts -= removed.size
        return removed
