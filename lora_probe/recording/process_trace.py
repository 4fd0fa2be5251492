"""The folder of one process in a trace.

In: a folder that a `TraceWriter` has written, complete or truncated anywhere, or from an untrusted source. Out: a
`ProcessTrace`: its records, and its segments and scored passes, whose values stay on disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lora_probe.adapter.folder import inside, listed
from lora_probe.errors import UnreadableFile
from lora_probe.recording import alive
from lora_probe.recording.documents import document, lines, too_deep
from lora_probe.recording.records import KINDS, SCHEMA, LoadEvent, Process, Record, RequestRecord, StationRecord
from lora_probe.recording.rows import Rows
from lora_probe.recording.scored import Scored, open_scored
from lora_probe.recording.segments import Segment, open_segment, read_rows

_SEGMENT = re.compile(r"[0-9]{1,18}\.safetensors")
_SCORE = re.compile(r"next-[0-9]{1,18}\.safetensors")

T = TypeVar("T")


@dataclass(frozen=True)
class Dropped:
    """What a recording left out: `segments` and `rows` were removed again to keep its bound, and `events` of the load
    timeline were not written for the same reason. `lost_rows` and `lost_records` could not be written."""

    segments: int = 0
    rows: int = 0
    events: int = 0
    lost_rows: int = 0
    lost_records: int = 0


@dataclass(frozen=True)
class ProcessTrace:
    """The folder of one process."""

    folder: Path
    process: Process
    records: tuple[Record, ...]
    requests: tuple[RequestRecord, ...]

    def of(self, kind: type[T]) -> list[T]:
        return [record for record in self.records if isinstance(record, kind)]

    @property
    def running(self) -> bool:
        """Whether the process runs now and may record more. False if it runs on another machine."""
        process = self.process
        return not process.closed and alive.is_running(process.pid, process.host, process.began)

    @property
    def dropped(self) -> Dropped:
        """What it left out, as it counted itself."""
        process = self.process
        return Dropped(
            process.dropped_segments,
            process.dropped_rows,
            process.dropped_events,
            process.lost_rows,
            process.lost_records,
        )

    @property
    def missing(self) -> int:
        """How many of the segments and scores that it closed, and did not remove itself, are missing."""
        names = [entry.name for entry in listed(self.folder)]
        segments, scores = (sum(map(bool, map(kind.fullmatch, names))) for kind in (_SEGMENT, _SCORE))
        kept = self.process.segments - self.process.dropped_segments
        return max(0, kept - segments) + max(0, self.process.scores - scores)

    @cached_property
    def used(self) -> frozenset[int]:
        """The loads with rows on disk, and those that were judged at `applied`."""
        judged = {record.load for record in self.of(StationRecord) if record.station == "applied"}
        return frozenset(judged.union(*(segment.loads for segment in self.opened_segments())))

    def opened_segments(self) -> Iterator[Segment]:
        """The segments in the order in which they were closed. Their values stay on disk."""
        for path in self._files(_SEGMENT):
            try:
                segment = open_segment(path)
            except UnreadableFile:
                if self.has_removed(path):
                    continue
                raise
            yield segment

    def has_removed(self, path: Path) -> bool:
        """Whether a running process has removed a segment to keep its bound, after it was listed here."""
        return not os.path.lexists(path) and self.running

    def segments(self) -> Iterator[Rows]:
        for segment in self.opened_segments():
            yield read_rows(segment)

    def scores(self) -> Iterator[Scored]:
        for path in self._files(_SCORE):
            yield open_scored(path)

    def _files(self, kind: re.Pattern[str]) -> list[Path]:
        names = [entry.name for entry in listed(self.folder) if kind.fullmatch(entry.name)]
        return [_file(self.folder, name) for name in names if not self.has_removed(self.folder / name)]


def _file(home: Path, name: str) -> Path:
    """A file of a process's folder. A link may lead to another file of the same trace."""
    return inside(home.parent, f"{home.name}/{name}")


def open_process(home: Path) -> ProcessTrace:
    path = _file(home, "process.json")
    process = document(path, Process)
    refuse_newer(path, process.schema)
    refuse_deep(path, process.settings)
    records = _lines(home, "events.jsonl", Record, _wrong_record, KINDS)
    requests = _lines(home, "requests.jsonl", RequestRecord, _wrong_request)
    return ProcessTrace(home, process, tuple(records), tuple(requests))


def _lines(
    home: Path, name: str, kind: Any, wrong: Callable[[Any], str], known: frozenset[str] = frozenset()
) -> list[Any]:
    """The lines that a process wrote; none if the file does not exist yet."""
    if not os.path.lexists(home / name):
        return []
    return lines(_file(home, name), msgspec.json.Decoder(kind), wrong, known)


def _wrong_record(record: Record) -> str:
    deep = isinstance(record, LoadEvent) and record.facts and too_deep(record.facts)
    return "its facts are nested too deeply" if deep else ""


def _wrong_request(request: RequestRecord) -> str:
    return f"its prompt number is {request.prompt}" if request.prompt < 0 else ""


def refuse_newer(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise UnreadableFile(
            f"`{path}` has trace schema {schema}; this version of lora-probe reads up to {SCHEMA}", "upgrade lora-probe"
        )


def refuse_deep(path: Path, value: dict[str, Any]) -> None:
    if too_deep(value):
        raise UnreadableFile(f"cannot read `{path}`: it is nested too deeply")
