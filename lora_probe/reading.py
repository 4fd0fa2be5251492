"""Reading a trace: `open_trace` and `Trace`, from the files alone.

In: a folder that `TraceWriter`s have written, whole or cut off anywhere. Out: its run, processes, loads with their
ledgers, requests, and rows. Unknown fields are ignored; a newer schema is refused by name; a cut last line is lost
and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from safetensors import SafetensorError, safe_open

from lora_probe.errors import UnreadableFile
from lora_probe.ledger import STATIONS, Finding, Ledger, Row, Station, graver
from lora_probe.rows import ROW_COLUMNS, Floats, Rows, concatenate, widened
from lora_probe.rules.loading import not_measured
from lora_probe.tracefile import (
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

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """One scored pass, its distributions still on disk: a vocabulary for every token is too much to hold for all."""

    path: Path
    score: Score

    def logprobs(self) -> Floats | None:
        """`[answer tokens, vocabulary]`, read from disk; None where they were not measured.

        Raises:
            UnreadableFile: the file was damaged since the trace was opened.
        """
        try:
            with safe_open(self.path, framework="numpy") as file:
                return file.get_tensor("logprobs") if "logprobs" in file.keys() else None  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UnreadableFile(f"cannot read `{self.path}`: {error}") from error


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
        """How many of the segments and scores that it closed are gone."""
        files = len(list(self.folder.glob("[0-9]*.safetensors"))), len(list(self.folder.glob("next-*.safetensors")))
        return max(0, self.process.segments - files[0]) + max(0, self.process.scores - files[1])

    def segments(self) -> Iterator[Rows]:
        for path in sorted(self.folder.glob("[0-9]*.safetensors")):
            yield _segment(path)

    def scores(self) -> Iterator[Scored]:
        for path in sorted(self.folder.glob("next-*.safetensors")):
            yield _scored(path)


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
        """The processes that did not close their recording, or whose segments are not all here."""
        return tuple(p.folder.name for p in self.processes if not p.process.closed or p.missing)

    @property
    def complete(self) -> bool:
        return bool(self.processes) and not self.unclosed

    @property
    def workers(self) -> tuple[ProcessTrace, ...]:
        """The processes that run layers: those that hold loads."""
        return tuple(p for p in self.processes if p.process.role != "client")

    @property
    def sharded(self) -> bool:
        """Whether each worker holds only its own share of every layer (tensor or pipeline parallelism)."""
        return len(self.workers) > 1

    @cached_property
    def requests(self) -> tuple[RequestRecord, ...]:
        return tuple(request for process in self.processes for request in process.requests)

    @cached_property
    def scores(self) -> tuple[Scored, ...]:
        """The scored passes, in the order in which they ran."""
        return tuple(scored for process in self.processes for scored in process.scores())

    @cached_property
    def events(self) -> tuple[LoadEvent, ...]:
        """The loading story of rank 0, in order."""
        found = [event for process in self.workers[:1] for event in process.of(LoadEvent)]
        return tuple(sorted(found, key=lambda event: event.at))

    @cached_property
    def loads(self) -> tuple[tuple[Load, Ledger], ...]:
        """Each load of an adapter with its ledger, ranks joined: of several findings the gravest counts."""
        numbers: dict[int, Load] = {}
        for process in self.workers:
            for load in process.of(Load):
                before = numbers.get(load.load)
                # A refusal on one rank is a refusal, whatever the others say.
                if before is None or not before.refused:
                    numbers[load.load] = load
        return tuple((load, self._ledger(load)) for load in numbers.values())

    @cached_property
    def modules(self) -> dict[tuple[Any, ...], ModuleRecord]:
        """The module records by load and key."""
        found: dict[tuple[Any, ...], ModuleRecord] = {}
        for process in self.workers:
            for module in process.of(ModuleRecord):
                found.setdefault((module.load, module.key), module)
        return found

    @cached_property
    def rows(self) -> Rows | None:
        """All rows, modules of several loads joined; None where no rows were kept, or where several ranks hold
        shards of them."""
        parts = [segment for process in self.workers for segment in process.segments()]
        if not parts or self.sharded:
            return None
        keys = tuple(dict.fromkeys(key for part in parts for key in part.modules))
        return concatenate([widened(part, keys) for part in parts])

    def _ledger(self, load: Load) -> Ledger:
        stations: dict[tuple[Any, ...], dict[Station, Finding]] = {}
        for process in self.workers:
            for record in process.of(StationRecord):
                if record.load != load.load:
                    continue
                finding = Finding(record.value, record.code, record.message)
                for key in record.keys:
                    mine = stations.setdefault(key, {})
                    mine[record.station] = graver(mine.get(record.station, finding), finding)
        rows = [
            Row(
                module.key,
                self._stations(stations.get(module.key, {})),
                tuple(module.expected_by),
                module.stored_as,
                module.engine_as,
            )
            for (number, _), module in self.modules.items()
            if number == load.load
        ]
        return Ledger(self.engine, tuple(rows), load.refused, load.message)

    def _stations(self, found: dict[Station, Finding]) -> dict[Station, Finding]:
        ended = "the recording ended before it was measured"
        missing = not_measured(ended)
        result: dict[Station, Finding] = {}
        gone = False
        for station in STATIONS:
            finding = found.get(station) or (Finding("absent") if gone else missing)
            gone = gone or (finding.value == "absent" and station != "stored")
            result[station] = finding
        return result


def open_trace(path: str | Path) -> Trace:
    """Open a trace folder.

    Raises:
        UnreadableFile: no such folder, no trace in it, or one written by a newer schema.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UnreadableFile(f"there is no trace `{folder}`", "record one with `lora-probe trace CKPT --engine ...`")
    run = _decoded(folder / "run.json", Run) if (folder / "run.json").exists() else None
    if run is not None:
        _refuse_newer(folder / "run.json", run.schema)
    processes = [_process(file.parent) for file in sorted(folder.glob("*/process.json"))]
    if run is None and not processes:
        raise UnreadableFile(f"`{folder}` is not a trace: it has neither run.json nor a process's folder")
    return Trace(folder, run, tuple(processes))


def _process(folder: Path) -> ProcessTrace:
    process = _decoded(folder / "process.json", Process)
    _refuse_newer(folder / "process.json", process.schema)
    records = _lines(folder / "events.jsonl", msgspec.json.Decoder(Record))
    requests = _lines(folder / "requests.jsonl", msgspec.json.Decoder(RequestRecord))
    return ProcessTrace(folder, process, tuple(records), tuple(requests))


def _decoded(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableFile(f"cannot read `{path}`: {error}") from error


def _refuse_newer(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise UnreadableFile(
            f"`{path}` is of trace schema {schema}, this lora-probe reads up to {SCHEMA}", "upgrade lora-probe"
        )


def _lines(path: Path, decoder: msgspec.json.Decoder[T]) -> list[T]:
    """The whole lines of a file. A cut last line is what a killed process leaves; any other bad line is an error."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise UnreadableFile(f"`{path}`, line {number}: {error}") from error
    return found


def _scored(path: Path) -> Scored:
    try:
        with safe_open(path, framework="numpy") as file:
            return Scored(path, msgspec.json.decode(file.metadata()["score"], type=Score))
    except (OSError, SafetensorError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise UnreadableFile(f"cannot read `{path}`: {error}") from error


def _segment(path: Path) -> Rows:
    try:
        with safe_open(path, framework="numpy") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            table = json.loads(file.metadata()["table"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UnreadableFile(f"cannot read the segment `{path}`: {error}") from error
    named = {name: columns.pop(name, None) for name in (*ROW_COLUMNS, "gram")}
    return Rows(
        tuple((module, parameter, expert) for module, parameter, expert in table["modules"]),
        tuple(table["requests"]),
        placed=tuple(table.get("placed", ())),
        tensors=columns or None,
        **named,
    )
