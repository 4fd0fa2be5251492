"""Writing a trace: `TraceWriter`, one for each process of a run.

In: records and rows. Out: that process's folder of a `RUN.lptrace`. Each line of events.jsonl and
requests.jsonl is flushed. Rows go into segments, which are written under another name and then renamed, so a process
that dies loses only the segment that was not closed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save_file

from lora_probe.ledger import Finding, Station
from lora_probe.names import Key
from lora_probe.recording.placed import Floats, Placed, same_loads
from lora_probe.recording.records import SCHEMA, LoadEvent, Process, Record, RequestRecord, Score, StationRecord
from lora_probe.recording.rows import Rows, concatenate
from lora_probe.recording.segments import contents

MAX_ROWS, MAX_BYTES, MAX_SECONDS = 4096, 64_000_000, 5.0
"""A segment closes at this many rows, at this many bytes of x, base and delta, or after this many seconds."""


class TraceWriter:
    """Writes one process's folder. Use it as a context manager: an exit without an exception marks the process as
    closed."""

    def __init__(self, folder: Path, process: Process) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.process = folder, process
        self._started = time.perf_counter()
        self._pending: list[Rows] = []
        self._placed: dict[int, Placed] = {}
        self._flushed = time.monotonic()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._segment = self._scores = 0
        self._events = (folder / "events.jsonl").open("ab", buffering=0)
        self._requests = (folder / "requests.jsonl").open("ab", buffering=0) if process.role == "client" else None
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
        self._events.write(msgspec.json.encode(record) + b"\n")

    def event(self, stage: str, text: str, *, module: str = "", seconds: float | None = None, **facts: Any) -> None:
        self.record(LoadEvent(self.now, stage, text, module, seconds, facts))

    def station(self, load: int, station: Station, finding: Finding, keys: Sequence[Key]) -> None:
        self.record(StationRecord(load, station, finding.value, list(keys), finding.code, finding.message))

    def request(self, request: RequestRecord) -> None:
        if self._requests is None:
            self._requests = (self.folder / "requests.jsonl").open("ab", buffering=0)
        self._requests.write(msgspec.json.encode(request) + b"\n")

    def rows(self, rows: Rows) -> None:
        """Add the rows of a step. A segment has one table of modules, and for each load one G at each of them."""
        with self._lock:
            last = self._pending[-1] if self._pending else rows
            if last.modules != rows.modules or not same_loads(self._placed, rows.placed):
                self.flush()
            self._pending.append(rows)
            self._placed |= rows.placed
            count = sum(map(len, self._pending))
            size = sum(part.nbytes for part in self._pending)
            if count >= MAX_ROWS or size >= MAX_BYTES or time.monotonic() - self._flushed >= MAX_SECONDS:
                self.flush()

    def flush_by_time(self) -> None:
        """From now on, also close a segment after MAX_SECONDS if no more rows come. A server may be idle for hours, and
        its workers are usually killed without warning."""

        def watch() -> None:
            while not self._closing.wait(MAX_SECONDS):
                if self._pending and time.monotonic() - self._flushed >= MAX_SECONDS:
                    self.flush()

        threading.Thread(target=watch, daemon=True, name="lora-probe-segments").start()

    def describe(self, **changes: Any) -> None:
        """Update process.json (with a dtype that is only known later)."""
        with self._lock:
            self.process = msgspec.structs.replace(self.process, **changes)
            self._write_process()

    def flush(self) -> None:
        """Close the current segment."""
        with self._lock:
            self._flushed = time.monotonic()
            rows, self._pending, self._placed = self._pending, [], {}
            if rows:
                self._segment += 1
                _save(*contents(concatenate(rows)), self.folder / f"{self._segment:06d}.safetensors")

    def score(self, score: Score, logprobs: Floats | None) -> None:
        """Write the next-token distributions of one pass. `logprobs: [answer tokens, vocabulary]`, row i predicting
        token i of the answer; None if there are none, and then `score.unmeasured` is the reason."""
        self._scores += 1
        tensors = {} if logprobs is None else {"logprobs": np.ascontiguousarray(logprobs, dtype=np.float32)}
        meta = {"schema": str(SCHEMA), "score": msgspec.json.encode(score).decode()}
        _save(tensors, meta, self.folder / f"next-{self._scores:06d}.safetensors")

    def close(self, complete: bool = True) -> None:
        if self._events.closed:
            return
        self._closing.set()
        self.flush()
        self._events.close()
        if self._requests is not None:
            self._requests.close()
        if complete:
            self.describe(closed=True, segments=self._segment, scores=self._scores)

    def _write_process(self) -> None:
        write_json(self.folder / "process.json", self.process)


def _save(tensors: dict[str, Any], meta: dict[str, str], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, meta)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under another name and rename it, so that no reader sees half of it."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    partial.replace(path)
