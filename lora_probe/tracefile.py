"""The one recording format, schema 1: what a run wrote, in a folder `RUN.lptrace`.

In (from engines): records and rows, through `TraceWriter`; each process writes its own folder. Out (for people):
nothing here, see `reading.py`. Lines of events.jsonl and requests.jsonl are flushed one by one; rows go into
segments that are written under another name and renamed, so a process that dies loses only what is not closed.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from lora_probe.adapter import Key
from lora_probe.ledger import Finding, Station, Value

SCHEMA = 1
LEVELS = ("events", "norms", "shrink", "tensors")
PREFILL, DECODE = 0, 1
MAX_ROWS, MAX_BYTES, MAX_SECONDS = 4096, 64_000_000, 5.0
"""A segment closes at this many rows, at this many bytes of x, base and delta, or after this time."""

Level = Literal["events", "norms", "shrink", "tensors"]
Floats = npt.NDArray[np.float32]


class Prompt(msgspec.Struct, frozen=True):
    """One prompt as text, and as the token ids that the engines see."""

    text: str
    ids: list[int] = []


class RunSpec(msgspec.Struct, frozen=True):
    """What to run. `options` are engine options by vLLM's names. `continuation` forces the first ids of each answer;
    `max_tokens` counts those after them."""

    engine: str
    adapter: str
    name: str
    model: str
    prompts: list[Prompt]
    max_tokens: int
    keep: Level = "shrink"
    options: dict[str, Any] = {}
    engine_args: list[str] = []
    chat: bool = False
    continuation: list[list[int]] | None = None


class Run(msgspec.Struct, frozen=True):
    """run.json: what was asked, by whoever started the run."""

    schema: int
    created: str
    spec: RunSpec
    versions: dict[str, str]


class Process(msgspec.Struct, frozen=True):
    """process.json: who wrote this folder. `changed` lists what recording changed in the engine."""

    schema: int
    role: str
    engine: str
    rank: int
    pid: int
    versions: dict[str, str]
    keep: str = "shrink"
    device: str = "cpu"
    dtype: str = ""
    lora_dtype: str = ""
    settings: dict[str, Any] = {}
    changed: list[str] = []
    not_recorded: str | None = None
    segments: int = 0
    closed: bool = False


class LoadEvent(msgspec.Struct, frozen=True, tag="event", tag_field="kind"):
    """One step of the loading story. `at`: seconds since the process began to record; `seconds`: its own length."""

    at: float
    stage: str
    text: str
    module: str = ""
    seconds: float | None = None
    facts: dict[str, Any] = {}


class Load(msgspec.Struct, frozen=True, tag="load", tag_field="kind"):
    """One load of an adapter: the thing a ledger belongs to. A later line of the same number replaces the earlier."""

    load: int
    name: str
    path: str
    digest: str
    engine_id: int | None = None
    generation: int = 0
    slot: int | None = None
    refused: bool = False
    message: str = ""
    said: list[str] = []


class ModuleRecord(msgspec.Struct, frozen=True, tag="module", tag_field="kind"):
    """One row of a load's ledger before its stations: names, shapes and the strength of its ΔW."""

    load: int
    module: str
    parameter: str
    expert: int | None
    expected_by: list[str]
    stored_as: str | None = None
    engine_as: str | None = None
    rank: int | None = None
    scaling: float | None = None
    norm: float | None = None
    effective_rank: float | None = None

    @property
    def key(self) -> Key:
        return self.module, self.parameter, self.expert


class StationRecord(msgspec.Struct, frozen=True, tag="station", tag_field="kind"):
    """What one station showed for some modules of a load. Of several records the gravest counts."""

    load: int
    station: Station
    value: Value
    keys: list[Key]
    code: str = ""
    message: str = ""


Record = LoadEvent | Load | ModuleRecord | StationRecord


class RequestRecord(msgspec.Struct, frozen=True):
    """One request and its answer. `prompt` numbers the spec's prompts; `logprobs` are those of `output_ids`, None
    where the engine gave no number (NaN)."""

    id: str
    prompt: int
    adapter: str | None
    prompt_ids: list[int]
    output_ids: list[int]
    text: str
    logprobs: list[float | None] = []
    seconds: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Rows of one step or of many, in columns. Every array has the row first and the module second.

    `request`, `position`, `phase` and `load` (-1: none) describe a row: `[rows]`. The norms are `[rows, modules]`,
    `shrink` is `[rows, modules, r]` (None below its level). NaN means that the row did not run there.
    `gram` (G of the placed s·B) is `[modules, r, r]`. `tensors` holds x, base and delta at level `tensors`,
    each `[rows, width]` under `x/3`, `base/3`, `delta/3` for module 3.
    """

    modules: tuple[Key, ...]
    requests: tuple[str, ...]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]
    load: npt.NDArray[np.int32]
    x_norm: Floats
    base_norm: Floats
    delta_norm: Floats
    output_norm: Floats
    shrink: Floats | None = None
    gram: Floats | None = None
    placed: tuple[str, ...] = ()
    tensors: dict[str, Floats] | None = None

    def __len__(self) -> int:
        return len(self.request)


ROW_COLUMNS = ("request", "position", "phase", "load", "x_norm", "base_norm", "delta_norm", "output_norm", "shrink")


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows of the same modules as one. The table of requests is joined, later `gram` wins."""
    requests: dict[str, int] = {}
    numbers = []
    for part in parts:
        for request in part.requests:
            requests.setdefault(request, len(requests))
        table = np.array([requests[name] for name in part.requests], dtype=np.int32)
        numbers.append(table[part.request] if len(part.requests) else part.request)
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ROW_COLUMNS[1:]
        if getattr(parts[0], name) is not None
    }
    last = parts[-1]
    return Rows(
        last.modules,
        tuple(requests),
        np.concatenate(numbers),
        gram=last.gram,
        placed=last.placed,
        tensors=_joined_tensors(parts),
        **columns,
    )


def _joined_tensors(parts: Sequence[Rows]) -> dict[str, Floats] | None:
    """x, base and delta of all parts; NaN in the rows of a part in which the module did not run."""
    widths = {name: values.shape[1] for part in parts for name, values in (part.tensors or {}).items()}
    if not widths:
        return None
    return {
        name: np.concatenate(
            [(part.tensors or {}).get(name, np.full((len(part), width), np.nan, np.float32)) for part in parts]
        )
        for name, width in widths.items()
    }


class TraceWriter:
    """Writes one process's folder. Use it as a context manager: leaving it cleanly marks the process as closed."""

    def __init__(self, folder: Path, process: Process) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.process = folder, process
        self._started = time.perf_counter()
        self._pending: list[Rows] = []
        self._flushed = time.monotonic()
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._segment = 0
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
        """Take the rows of a step. A segment holds one table of modules and one G for each of them."""
        with self._lock:
            last = self._pending[-1] if self._pending else rows
            if (last.modules, last.placed) != (rows.modules, rows.placed):
                self.flush()
            self._pending.append(rows)
            count = sum(map(len, self._pending))
            size = sum(values.nbytes for part in self._pending for values in (part.tensors or {}).values())
            if count >= MAX_ROWS or size >= MAX_BYTES or time.monotonic() - self._flushed >= MAX_SECONDS:
                self.flush()

    def flush_by_time(self) -> None:
        """From now on close a segment that has waited too long although no more rows come: a server may be idle for
        hours, and its workers are ended without a word."""

        def watch() -> None:
            while not self._closing.wait(MAX_SECONDS):
                if self._pending and time.monotonic() - self._flushed >= MAX_SECONDS:
                    self.flush()

        threading.Thread(target=watch, daemon=True, name="lora-probe-segments").start()

    def describe(self, **changes: Any) -> None:
        """Correct what process.json says (a dtype that is only known later)."""
        self.process = msgspec.structs.replace(self.process, **changes)
        self._write_process()

    def flush(self) -> None:
        """Close the current segment."""
        with self._lock:
            self._flushed = time.monotonic()
            rows, self._pending = self._pending, []
            if rows:
                self._segment += 1
                self._write_segment(concatenate(rows))

    def _write_segment(self, rows: Rows) -> None:
        columns = {name: getattr(rows, name) for name in (*ROW_COLUMNS, "gram")}
        tensors = {name: np.ascontiguousarray(column) for name, column in columns.items() if column is not None}
        tensors |= rows.tensors or {}
        table = {"modules": rows.modules, "requests": rows.requests, "placed": rows.placed}
        path = self.folder / f"{self._segment:06d}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"schema": str(SCHEMA), "table": json.dumps(table)})
        partial.replace(path)

    def close(self, complete: bool = True) -> None:
        if self._events.closed:
            return
        self._closing.set()
        self.flush()
        self._events.close()
        if self._requests is not None:
            self._requests.close()
        if complete:
            self.describe(closed=True, segments=self._segment)

    def _write_process(self) -> None:
        write_json(self.folder / "process.json", self.process)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under another name and rename it, so that nobody reads half of it."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    partial.replace(path)
