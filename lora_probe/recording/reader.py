"""Reading a trace: `open_trace` and `Trace`, from the files alone.

In: a folder that `TraceWriter`s have written, complete or truncated anywhere, or from an untrusted source. Out: its
run, processes, loads with their ledgers, requests, and rows. Unknown fields are ignored; a newer schema is an error; of
a truncated last line only that line is lost. Only regular files inside the folder are read, and all within limits.
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

from lora_probe.adapter import CONFIG
from lora_probe.adapter.folder import inside, listed
from lora_probe.errors import UnreadableFile, command
from lora_probe.files import brief, shown
from lora_probe.files.weights import MAX_VALUES, TensorHeader, WeightsFile
from lora_probe.ledger import Finding, Ledger, Row, Station, completed, worse
from lora_probe.names import Key
from lora_probe.recording.documents import decoded, document, lines, too_deep
from lora_probe.recording.placed import Floats
from lora_probe.recording.records import (
    SCHEMA,
    Load,
    LoadEvent,
    ModuleRecord,
    Process,
    Record,
    RequestRecord,
    Run,
    Score,
    StationRecord,
)
from lora_probe.recording.rows import Rows
from lora_probe.recording.segments import Segment, joined, open_recorded, open_segment, read_rows, values
from lora_probe.rules import all_rules
from lora_probe.rules.lp5_loading import not_measured

_RECORD = "record one with `lora-probe trace CKPT --engine ...`"
_SEGMENT = re.compile(r"[0-9]{1,18}\.safetensors")
_SCORE = re.compile(r"next-[0-9]{1,18}\.safetensors")

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """One scored pass. Its distributions stay on disk: a whole vocabulary for every token takes too much memory."""

    path: Path
    score: Score

    def logprobs(self) -> Floats | None:
        """`[answer tokens, vocabulary]`, read from disk; None if they were not measured.

        Raises:
            UnreadableFile: the file is damaged.
        """
        weights = open_recorded(self.path, "a scored pass")
        header = _distributions(weights, self.score)
        return None if header is None else values(weights, header)


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
    def missing(self) -> int:
        """How many of the segments and scores that it closed are missing."""
        names = [entry.name for entry in listed(self.folder)]
        segments, scores = (sum(map(bool, map(kind.fullmatch, names))) for kind in (_SEGMENT, _SCORE))
        return max(0, self.process.segments - segments) + max(0, self.process.scores - scores)

    def opened_segments(self) -> Iterator[Segment]:
        """The segments in the order in which they were closed. Their values stay on disk."""
        for path in self._files(_SEGMENT):
            yield open_segment(path)

    def segments(self) -> Iterator[Rows]:
        for segment in self.opened_segments():
            yield read_rows(segment)

    def scores(self) -> Iterator[Scored]:
        for path in self._files(_SCORE):
            yield _scored(path)

    def _files(self, kind: re.Pattern[str]) -> list[Path]:
        names = [entry.name for entry in listed(self.folder) if kind.fullmatch(entry.name)]
        return [_file(self.folder, name) for name in names]


@dataclass(frozen=True)
class Trace:
    """A recorded run."""

    path: Path
    run: Run | None
    processes: tuple[ProcessTrace, ...]

    @property
    def engine(self) -> str:
        return self.processes[0].process.engine if self.processes else (self.run.spec.engine if self.run else "?")

    @property
    def unclosed(self) -> tuple[str, ...]:
        """The processes that did not close their recording, or with segments missing."""
        return tuple(p.folder.name for p in self.processes if not p.process.closed or p.missing)

    @property
    def complete(self) -> bool:
        return bool(self.processes) and not self.unclosed

    @property
    def workers(self) -> tuple[ProcessTrace, ...]:
        """The processes that run layers and load adapters."""
        return tuple(p for p in self.processes if p.process.role != "client")

    @property
    def sharded(self) -> bool:
        """Whether each worker holds only its own share of every layer (tensor or pipeline parallelism)."""
        return len(self.workers) > 1

    @cached_property
    def requests(self) -> tuple[RequestRecord, ...]:
        return tuple(request for process in self.processes for request in process.requests)

    def forced(self, request: RequestRecord) -> int:
        """How many tokens at the beginning of an answer were forced (`--follow`), not generated."""
        continuation = (self.run.spec.continuation if self.run else None) or []
        count = len(continuation[request.prompt]) if 0 <= request.prompt < len(continuation) else 0
        return min(count, len(request.output_ids))

    @cached_property
    def scores(self) -> tuple[Scored, ...]:
        """The scored passes, in the order in which they ran."""
        return tuple(scored for process in self.processes for scored in process.scores())

    @cached_property
    def events(self) -> tuple[LoadEvent, ...]:
        """The load timeline of rank 0, in order."""
        events = [event for process in self.workers[:1] for event in process.of(LoadEvent)]
        return tuple(sorted(events, key=lambda event: event.at))

    @cached_property
    def loads(self) -> tuple[tuple[Load, Ledger], ...]:
        """Each load of an adapter with its ledger, joined over the ranks: of several findings the worst counts."""
        numbers: dict[int, Load] = {}
        for process in self.workers:
            for load in process.of(Load):
                before = numbers.get(load.load)
                # A refusal on one rank is a refusal, whatever the other ranks report.
                if before is None or not before.refused:
                    numbers[load.load] = load
        stations, rows = self._stations_of_loads(), self._modules_of_loads()
        return tuple(
            (load, self._ledger(load, rows.get(number, []), stations.get(number, {})))
            for number, load in numbers.items()
        )

    @cached_property
    def modules(self) -> dict[tuple[Any, ...], ModuleRecord]:
        """The module records by load and key."""
        records: dict[tuple[Any, ...], ModuleRecord] = {}
        for process in self.workers:
            for module in process.of(ModuleRecord):
                records.setdefault((module.load, module.key), module)
        return records

    @cached_property
    def rows(self) -> Rows | None:
        """All rows, modules of several loads joined; None if no rows were kept, or if several ranks have shards of
        them."""
        if self.sharded:
            return None
        segments = [segment for process in self.workers for segment in process.opened_segments()]
        return joined(segments) if segments else None

    def _stations_of_loads(self) -> dict[int, dict[Key, dict[Station, Finding]]]:
        """The findings by the number of the load, the module and the station."""
        findings: dict[int, dict[Key, dict[Station, Finding]]] = {}
        rules = all_rules()
        for process in self.workers:
            for record in process.of(StationRecord):
                finding = Finding(record.value, record.code, record.message)
                # A record does not contain the facts of its rule. A rule of a newer lora-probe is unknown here.
                if (rule := rules.get(record.code)) is not None:
                    finding = rule.finding(record.value, record.message)
                modules = findings.setdefault(record.load, {})
                for key in record.keys:
                    stations = modules.setdefault(key, {})
                    stations[record.station] = worse(stations.get(record.station, finding), finding)
        return findings

    def _modules_of_loads(self) -> dict[int, list[ModuleRecord]]:
        records: dict[int, list[ModuleRecord]] = {}
        for (number, _), module in self.modules.items():
            records.setdefault(number, []).append(module)
        return records

    def _ledger(self, load: Load, modules: list[ModuleRecord], stations: dict[Key, dict[Station, Finding]]) -> Ledger:
        missing = not_measured("the recording ended before it was measured")
        rows = [
            Row(
                module.key,
                completed(stations.get(module.key, {}), missing),
                tuple(module.expected_by),
                module.stored_as,
                module.engine_as,
            )
            for module in modules
        ]
        return Ledger(self.engine, tuple(rows), load.refused, load.message)


def open_trace(path: str | Path) -> Trace:
    """Open a trace folder.

    Raises:
        UnreadableFile: there is no such folder, no trace in it, or its schema is newer.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UnreadableFile(f"trace `{folder}` does not exist", _RECORD)
    run = _run(folder) if os.path.lexists(folder / "run.json") else None
    processes = [_process(home) for home in _homes(folder)]
    if run is None and not processes:
        if (folder / CONFIG).is_file():
            raise UnreadableFile(f"`{folder}` is an adapter, not a trace", command("inspect", folder))
        raise UnreadableFile(
            f"`{folder}` is not a trace: it contains neither run.json nor the folder of a process", _RECORD
        )
    return Trace(folder, run, tuple(processes))


def _run(folder: Path) -> Run:
    path = inside(folder, "run.json")
    run = document(path, Run)
    _refuse_newer(path, run.schema)
    _refuse_deep(path, run.spec.options)
    return run


def _homes(folder: Path) -> list[Path]:
    """The folders of the processes. A symbolic link is an error, as it may lead anywhere."""
    homes = []
    for home in listed(folder):
        if not home.is_dir() or not os.path.lexists(home / "process.json"):
            continue
        if not home.name.isprintable():
            raise UnreadableFile(f"a folder in `{folder}` has an invalid name: `{shown(home.name)}`")
        if home.is_symlink():
            raise UnreadableFile(
                f"`{home}` is a symbolic link, not a folder that a process wrote",
                "copy the folder into the trace if you trust it",
            )
        homes.append(home)
    return homes


def _file(home: Path, name: str) -> Path:
    """A file of a process's folder. A link may lead to another file of the same trace."""
    return inside(home.parent, f"{home.name}/{name}")


def _process(home: Path) -> ProcessTrace:
    path = _file(home, "process.json")
    process = document(path, Process)
    _refuse_newer(path, process.schema)
    _refuse_deep(path, process.settings)
    records = _lines(home, "events.jsonl", Record, _wrong_record)
    requests = _lines(home, "requests.jsonl", RequestRecord, _wrong_request)
    return ProcessTrace(home, process, tuple(records), tuple(requests))


def _lines(home: Path, name: str, kind: Any, wrong: Callable[[Any], str]) -> list[Any]:
    """The lines that a process wrote; none if the file does not exist yet."""
    if not os.path.lexists(home / name):
        return []
    return lines(_file(home, name), msgspec.json.Decoder(kind), wrong)


def _wrong_record(record: Record) -> str:
    deep = isinstance(record, LoadEvent) and record.facts and too_deep(record.facts)
    return "its facts are nested too deeply" if deep else ""


def _wrong_request(request: RequestRecord) -> str:
    return f"its prompt number is {request.prompt}" if request.prompt < 0 else ""


def _refuse_newer(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise UnreadableFile(
            f"`{path}` has trace schema {schema}; this version of lora-probe reads up to {SCHEMA}", "upgrade lora-probe"
        )


def _refuse_deep(path: Path, value: dict[str, Any]) -> None:
    if too_deep(value):
        raise UnreadableFile(f"cannot read `{path}`: it is nested too deeply")


def _scored(path: Path) -> Scored:
    weights = open_recorded(path, "a scored pass")
    text = weights.metadata.get("score")
    if text is None:
        raise _no_score(path, "its metadata has no `score`")
    try:
        score = decoded(text, msgspec.json.Decoder(Score))
    except ValueError as error:
        raise _no_score(path, f"its `score` cannot be read: {error}") from error
    if min((score.prompt, *score.prompt_ids, *score.answer_ids)) < 0:
        raise _no_score(path, "its prompt number, or a token id, is negative")
    _distributions(weights, score)
    return Scored(path, score)


def _distributions(weights: WeightsFile, score: Score) -> TensorHeader | None:
    """The tensor of a pass's distributions; None if they were not measured."""
    header = weights.tensors.get("logprobs")
    if header is None:
        return None
    answers, last = len(score.answer_ids), max(score.answer_ids, default=-1)
    if header.dtype != "F32" or len(header.shape) != 2 or header.shape[0] != answers:
        is_now = f"{header.dtype} {brief(list(header.shape))}"
        raise _no_score(weights.path, f"`logprobs` is {is_now}, expected F32 [{answers}, vocabulary]")
    if last >= header.shape[1]:
        raise _no_score(weights.path, f"its answer contains token {last}, but its vocabulary has {header.shape[1]}")
    if header.parameters > MAX_VALUES:
        raise _no_score(weights.path, f"it has {header.parameters} values, more than the limit of {MAX_VALUES}")
    return header


def _no_score(path: Path, why: str) -> UnreadableFile:
    return UnreadableFile(f"the scored pass `{path}` is damaged: {why}", "copy the trace again, or record it again")
