"""Writing a trace: `TraceWriter`, one for each process of a run.

In: records and rows. Out: that process's folder of a `RUN.lptrace`. Each line of events.jsonl and requests.jsonl is
written at once. Rows go into segments, one load in each; a segment is written under another name and then renamed, so
a process that dies loses only the rows of the segment that was not closed. process.json is kept current with each.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from lora_probe.ledger import Finding, Station
from lora_probe.names import Key
from lora_probe.recording import alive
from lora_probe.recording.documents import MAX_LINES
from lora_probe.recording.lines import Lines
from lora_probe.recording.outage import Outage
from lora_probe.recording.parts import Parts
from lora_probe.recording.pending import Pending, segment_bytes
from lora_probe.recording.placed import Floats
from lora_probe.recording.records import (
    SCHEMA,
    Load,
    LoadEvent,
    ModuleRecord,
    Process,
    Record,
    RequestRecord,
    Score,
    StationRecord,
)
from lora_probe.recording.rows import Rows
from lora_probe.recording.segment_store import SegmentStore, save
from lora_probe.recording.timeline import Timeline

MAX_SECONDS = 3.0
"""The rows of a process that writes by time are on disk after this time, and sooner if the engine is idle. vLLM sends
SIGKILL directly after SIGTERM to its own processes unless it has a --shutdown-timeout, so what is not on disk when a
server is ended is lost."""
LOOK_SECONDS = 0.02
"""How often the thread that writes by time looks, while there are rows."""
MOST_RECORDS = MAX_LINES - 1_000_000
"""Bytes of events.jsonl that are written. A load takes 0.6 kB for each of its modules: 10,000 loads of 90 modules."""
MOST_WRITTEN = 10_000
"""Loads and findings that are remembered: what was written before is not written again."""


class TraceWriter:
    """Writes one process's folder. Use it as a context manager: an exit without an exception marks the process as
    closed.

    `max_bytes` bounds the segments (`ring.py`) and the load timeline (`timeline.py`). With `report` no error of the
    disk is raised: `report` is called with a sentence when writing fails and when it works again, and what cannot be
    written meanwhile waits or is counted (`outage.py`).
    """

    def __init__(
        self,
        folder: Path,
        process: Process,
        max_bytes: int | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.process = folder, msgspec.structs.replace(process, **alive.this_process())
        self._started = time.perf_counter()
        self._lock = threading.RLock()
        self._wake, self._closed = threading.Event(), False
        self._parts, self._pending = Parts(), Pending(segment_bytes(max_bytes))
        self._segments = SegmentStore(folder, max_bytes)
        self._timeline = Timeline() if max_bytes is not None else None
        self._written: dict[bytes, bytes] = {}
        self._full = False
        self._scores = 0
        self._outage = Outage(report)
        self._events = Lines(folder / "events.jsonl")
        self._requests = Lines(folder / "requests.jsonl") if process.role == "client" else None
        self._write_process()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(complete=kind is None)

    @property
    def now(self) -> float:
        return round(time.perf_counter() - self._started, 6)

    def record(self, record: Record) -> None:
        with self._lock:
            if isinstance(record, Load) and self._is_known(b"load %d" % record.load, msgspec.json.encode(record)):
                return
            if isinstance(record, ModuleRecord):
                self._parts.announce(record)
            before = self._timeline.loading(record) if self._timeline is not None and isinstance(record, Load) else []
            for entry in (*before, record):
                self._write_event(entry)

    def event(self, stage: str, text: str, *, module: str = "", seconds: float | None = None, **facts: Any) -> None:
        event = LoadEvent(self.now, stage, text, module, seconds, facts)
        with self._lock:
            for entry in self._timeline.admitted(event) if self._timeline is not None else [event]:
                self._write_event(entry)

    def station(self, load: int, station: Station, finding: Finding, keys: Sequence[Key]) -> None:
        record = StationRecord(load, station, finding.value, list(keys), finding.code, finding.message)
        line = msgspec.json.encode(record)
        with self._lock:
            if not self._is_known(line, line):
                self._write_event(record)

    def _is_known(self, what: bytes, line: bytes) -> bool:
        """Whether `line` is the last that was written about something. An adapter that gets its slot again and again is
        judged each time, mostly with the same outcome."""
        name, digest = (hashlib.blake2b(data, digest_size=16).digest() for data in (what, line))
        before = self._written.pop(name, None)
        self._written[name] = digest
        if len(self._written) > MOST_WRITTEN:
            del self._written[next(iter(self._written))]
        return before == digest

    def request(self, request: RequestRecord) -> None:
        if self._requests is None:
            self._requests = Lines(self.folder / "requests.jsonl")
        self._requests.write(msgspec.json.encode(request) + b"\n")

    def rows(self, rows: Rows) -> None:
        """Add the rows of a step. Each load has segments of its own, and so have rows without a load."""
        with self._lock:
            for part in self._parts.of(rows):
                for full in self._pending.add(part):
                    self._write_rows(full)
            if self._pending.full or (self._pending.due(MAX_SECONDS) and not self._outage):
                self.flush()
        self._wake.set()

    def flush_by_time(self, guard: Callable[[str], AbstractContextManager[None]]) -> None:
        """From now on, also close segments by time, in a thread of its own and within `guard`. A server may be idle for
        hours, and its workers are usually killed without warning."""

        def watch() -> None:
            while self._wake.wait() and not self._closed:
                time.sleep(LOOK_SECONDS)
                with guard("writing the rows"), self._lock:
                    if self._outage:
                        # New rows wait where they are: written one by one they would be many small segments.
                        self._outage.attempt(self._catch_up)
                    elif self._pending.due(MAX_SECONDS) or self._pending.idle:
                        self.flush()
                    elif not self._pending:
                        self._wake.clear()

        threading.Thread(target=watch, daemon=True, name="lora-probe-segments").start()

    def describe(self, **changes: Any) -> None:
        """Update process.json (with a dtype that is only known later)."""
        with self._lock:
            self.process = msgspec.structs.replace(self.process, **changes)
            if not self._outage.attempt(self._write_process):
                self._wake.set()

    def flush(self) -> None:
        """Close the current segments, and write what had to wait."""
        with self._lock:
            if not self._closed:
                for rows in self._pending.taken():
                    self._write_rows(rows)
                self._outage.attempt(self._catch_up)

    def score(self, score: Score, logprobs: Floats | None) -> None:
        """Write the next-token distributions of one pass. `logprobs: [answer tokens, vocabulary]`, row i predicting
        token i of the answer; None if there are none, and then `score.unmeasured` is the reason."""
        self._scores += 1
        tensors = {} if logprobs is None else {"logprobs": np.ascontiguousarray(logprobs, dtype=np.float32)}
        meta = {"schema": str(SCHEMA), "score": msgspec.json.encode(score).decode()}
        save(tensors, meta, self.folder / f"next-{self._scores:06d}.safetensors")

    def close(self, complete: bool = True) -> None:
        """Write the rest. May be called again. Afterwards nothing is written any more."""
        with self._lock:
            if self._closed:
                return
            try:
                for event in self._timeline.rest() if self._timeline is not None else []:
                    self._write_event(event)
                self._outage.last_chance()
                self.process = msgspec.structs.replace(self.process, closed=complete)
                self.flush()
            finally:
                self._closed = True
                self._wake.set()
                self._events.close()
                if self._requests is not None:
                    self._requests.close()
                self._outage.end()

    def _write_event(self, record: Record) -> None:
        """Write a line of events.jsonl, or let it wait behind others."""
        line = msgspec.json.encode(record) + b"\n"
        if self._closed:
            raise ValueError(f"the recording in {self.folder} is closed")
        if self._events.size + len(line) > MOST_RECORDS:
            self._records_are_full()
            return

        def write() -> None:
            self._follow_folder()
            self._events.write(line)

        if self._outage or not self._outage.attempt(write):
            self._outage.keep_line(line)
            self._wake.set()

    def _records_are_full(self) -> None:
        """A reader refuses a larger file, so the record is lost. The first time this is reported, also in the file."""
        if not self._full:
            self._full = True
            text = f"events.jsonl has {MOST_RECORDS} bytes: ledgers of later loads are not recorded"
            self._outage.tell(text)
            note = msgspec.json.encode(LoadEvent(self.now, "lost", text)) + b"\n"
            self._outage.attempt(lambda: self._events.write(note))
        self._outage.lost_records += 1

    def _write_rows(self, rows: Rows) -> None:
        """Write a segment, or let its rows wait behind others."""

        def write() -> None:
            self._follow_folder()
            self._segments.write(rows)

        if self._outage or not self._outage.attempt(write):
            self._outage.keep_rows(rows)

    def _catch_up(self) -> None:
        """Write what waits, and what process.json counts."""
        self._follow_folder()
        for line in self._outage.lines():
            self._events.write(line)
        for rows in self._outage.rows():
            self._segments.write(rows)
        if summary := self._outage.summary:
            self._events.write(msgspec.json.encode(LoadEvent(self.now, "lost", summary)) + b"\n")
            self._outage.over()
        if self._current() != self._in_file:
            self._write_process()
        self._segments.remove_dropped()

    def _follow_folder(self) -> None:
        """Create the folder again if someone has removed it, as far as errors of the disk are tolerated."""
        if not self._outage.tolerated or not self._events.removed:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        events = Lines(self.folder / "events.jsonl")
        self._events.close()
        self._events = events
        self._segments.forget()
        text = "the folder was removed while this process recorded into it; what was recorded before is gone"
        self._outage.tell(text)
        self._events.write(msgspec.json.encode(LoadEvent(self.now, "lost", text)) + b"\n")
        self._write_process()

    def _current(self) -> Process:
        """What process.json is to contain now."""
        counts, outage = self._segments.counts, self._outage
        return msgspec.structs.replace(
            self.process,
            segments=counts.segments,
            scores=self._scores,
            dropped_segments=counts.dropped_segments,
            dropped_rows=counts.dropped_rows,
            dropped_events=self._timeline.dropped if self._timeline is not None else 0,
            lost_rows=outage.lost_rows,
            lost_records=outage.lost_records,
        )

    def _write_process(self) -> None:
        current = self._current()
        write_json(self.folder / "process.json", current)
        self.process = self._in_file = current


def write_json(path: Path, value: Any) -> None:
    """Write JSON under another name and rename it, so that no reader sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    partial.replace(path)
