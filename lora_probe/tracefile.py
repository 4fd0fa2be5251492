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
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
from safetensors.numpy import save_file

from lora_probe.adapter import Key
from lora_probe.ledger import Finding, Station, Value
from lora_probe.rows import ROW_COLUMNS, Floats, Rows, concatenate

SCHEMA = 1
LEVELS = ("events", "norms", "shrink", "tensors")
PREFILL, DECODE = 0, 1
MAX_ROWS, MAX_BYTES, MAX_SECONDS = 4096, 64_000_000, 5.0
"""A segment closes at this many rows, at this many bytes of x, base and delta, or after this time."""

Level = Literal["events", "norms", "shrink", "tensors"]
Kind = Literal["adapter", "base", "plain"]


class Prompt(msgspec.Struct, frozen=True):
    """One prompt as text, and as the token ids that the engines see."""

    text: str
    ids: list[int] = []


class RunSpec(msgspec.Struct, frozen=True):
    """What to run. `options` are engine options by vLLM's names. `continuation` forces the first ids of each answer;
    `max_tokens` counts those after them.

    With `score` every answer is run once more in one pass, with and without the adapter, and the next-token
    distributions of its tokens are kept. A plain run (`adapter` None) only scores `model`: `continuation` holds whole
    answers, and `watch` the paths of the modules whose outputs are recorded.
    """

    engine: str
    adapter: str | None
    name: str
    model: str
    prompts: list[Prompt]
    max_tokens: int
    keep: Level = "shrink"
    options: dict[str, Any] = {}
    engine_args: list[str] = []
    chat: bool = False
    continuation: list[list[int]] | None = None
    score: bool = False
    watch: list[str] = []


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
    scores: int = 0
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


class Score(msgspec.Struct, frozen=True):
    """One scored pass: `prompt_ids` and all but the last of `answer_ids` in one forward pass, with the adapter, without
    it, or through a model that has none. `unmeasured` says why its distributions were not kept, if they were not."""

    request: str
    prompt: int
    kind: Kind
    prompt_ids: list[int]
    answer_ids: list[int]
    unmeasured: str = ""


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
        meta = {"schema": str(SCHEMA), "table": json.dumps(table)}
        _save(tensors, self.folder / f"{self._segment:06d}.safetensors", meta)

    def score(self, score: Score, logprobs: Floats | None) -> None:
        """Write the next-token distributions of one pass. `logprobs: [answer tokens, vocabulary]`, row i predicting
        token i of the answer; None where `score.unmeasured` says why there are none."""
        self._scores += 1
        tensors = {} if logprobs is None else {"logprobs": np.ascontiguousarray(logprobs, dtype=np.float32)}
        meta = {"schema": str(SCHEMA), "score": msgspec.json.encode(score).decode()}
        _save(tensors, self.folder / f"next-{self._scores:06d}.safetensors", meta)

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


def _save(tensors: dict[str, Any], path: Path, meta: dict[str, str]) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, meta)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under another name and rename it, so that nobody reads half of it."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    partial.replace(path)
