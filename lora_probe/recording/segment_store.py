"""The segments of one process while it records: their numbers, their bound, and which of them has a load's G.

In: the rows of one load, or of none, from a `TraceWriter`. Out: one file for each call, whole or not at all; and which
files exceed the bound. They are removed after process.json counts them, so that a reader never takes them for lost.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file

from lora_probe.recording.placed import Placed
from lora_probe.recording.ring import Entry, Ring
from lora_probe.recording.rows import Rows
from lora_probe.recording.segments import contents

MOST_LOADS = 256
"""For so many loads it is known that their G has been written. For others it is written again."""


@dataclass(frozen=True)
class Counts:
    """What was written so far, and what of it was removed again to keep the bound."""

    segments: int = 0
    dropped_segments: int = 0
    dropped_rows: int = 0


@dataclass(frozen=True)
class _Written:
    """The segment with the weights of a load: their digests, and their G if the level kept it."""

    digests: tuple[str, ...]
    gram: bool
    segment: Path


class SegmentStore:
    """The segments in `folder`, with at most `bound` bytes."""

    def __init__(self, folder: Path, bound: int | None) -> None:
        self.counts = Counts()
        self._folder, self._bound = folder, bound
        self._dropped: list[Path] = []
        self._ring = Ring(bound)
        self._written: OrderedDict[int, _Written] = OrderedDict()

    def write(self, rows: Rows) -> None:
        """Write one segment.

        Raises:
            OSError: it could not be written, and there is no part of it.
        """
        number = self.counts.segments + 1
        path = self._folder / f"{number:06d}.safetensors"
        new = {load for load, placed in rows.placed.items() if not self._has_weights(load, placed)}
        first = any(load not in self._written for load in rows.placed)
        without = {load: Placed(placed.digests) for load, placed in rows.placed.items()}
        save(*contents(rows if new else replace(rows, placed=without)), path)
        size = path.stat().st_size
        self.counts = replace(self.counts, segments=number)
        for load, placed in rows.placed.items():
            if load in new:
                self._written[load] = _Written(placed.digests, placed.gram is not None, path)
            self._written.move_to_end(load)
        while len(self._written) > MOST_LOADS:
            self._written.popitem(last=False)
        self._drop(list(self._ring.add(path, len(rows), size, first)))

    def forget(self) -> None:
        """The folder was removed: there are no earlier segments."""
        self._ring = Ring(self._bound)
        self._written.clear()

    def _has_weights(self, load: int, placed: Placed) -> bool:
        """Whether an earlier segment has all that is known of these weights."""
        written = self._written.get(load)
        return written is not None and written.digests == placed.digests and (placed.gram is None or written.gram)

    def remove_dropped(self) -> None:
        """Remove the files that are counted as dropped.

        Raises:
            OSError: as far as they can be removed. The others are still listed.
        """
        while self._dropped:
            self._dropped[-1].unlink(missing_ok=True)
            self._dropped.pop()

    def _drop(self, entries: list[Entry]) -> None:
        self.counts = replace(
            self.counts,
            dropped_segments=self.counts.dropped_segments + len(entries),
            dropped_rows=self.counts.dropped_rows + sum(entry.rows for entry in entries),
        )
        removed = {entry.path for entry in entries}
        self._dropped += removed
        for load in [load for load, written in self._written.items() if written.segment in removed]:
            del self._written[load]


def save(tensors: dict[str, Any], meta: dict[str, str], path: Path) -> None:
    """Write a safetensors file under another name and rename it, so that no reader sees half of it.

    Raises:
        OSError: it could not be written.
    """
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, meta)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(str(error)) from error
