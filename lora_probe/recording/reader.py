"""Reading a trace: `open_trace` and `Trace`, from the files alone.

In: a folder that `TraceWriter`s have written, complete or truncated anywhere, or from an untrusted source. Out: its
newest run: processes, loads with their ledgers, requests, and rows; and the paths of its other runs. Unknown fields and
unknown kinds of records are ignored; a newer schema is an error; of a truncated last line only that line is lost. Only
regular files inside the folder are read, and all within limits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_probe.adapter import CONFIG
from lora_probe.adapter.folder import inside, listed
from lora_probe.errors import UnreadableFile, command
from lora_probe.files import shown
from lora_probe.ledger import Finding, Ledger, Row, Station, completed, worse
from lora_probe.names import Key
from lora_probe.presented import Presented
from lora_probe.recording.documents import document
from lora_probe.recording.fingerprint import Fingerprint, fingerprints_in, other_tensors_in
from lora_probe.recording.observed import observed_requests
from lora_probe.recording.process_trace import Dropped, ProcessTrace, open_process, refuse_deep, refuse_newer
from lora_probe.recording.ranks import Shards, joined_ranks
from lora_probe.recording.records import (
    Load,
    LoadEvent,
    ModuleRecord,
    Outcome,
    RequestFinding,
    RequestRecord,
    Run,
    StationRecord,
)
from lora_probe.recording.requests import joined_findings, with_client_ids
from lora_probe.recording.rows import Rows, of_load, side_by_side
from lora_probe.recording.runs import inside_of, later_runs
from lora_probe.recording.scored import Scored
from lora_probe.recording.segments import Segment, joined, read_rows, values
from lora_probe.rules import all_rules
from lora_probe.rules.lp5_loading import not_measured

_RECORD = "record one with `lora-probe trace CKPT --engine ...`"


@dataclass(frozen=True, repr=False)
class Trace(Presented):
    """A recorded run. `path` is its own folder; `other_runs` are the other ones in the same trace folder."""

    path: Path
    run: Run | None
    processes: tuple[ProcessTrace, ...]
    other_runs: tuple[Path, ...] = ()

    @property
    def engine(self) -> str:
        return self.processes[0].process.engine if self.processes else (self.run.spec.engine if self.run else "?")

    @property
    def unclosed(self) -> tuple[str, ...]:
        """The processes that did not close their recording, or with segments missing, or that could not write all."""
        return tuple(
            p.folder.name
            for p in self.processes
            if not p.process.closed or p.missing or p.dropped.lost_rows or p.dropped.lost_records
        )

    @property
    def complete(self) -> bool:
        return bool(self.processes) and not self.unclosed

    @property
    def running(self) -> bool:
        """Whether a process of it still records."""
        return any(process.running for process in self.processes)

    @property
    def dropped(self) -> Dropped:
        """What its processes left out to keep their bounds, or could not write."""
        parts = [process.dropped for process in self.processes]
        return Dropped(
            sum(part.segments for part in parts),
            sum(part.rows for part in parts),
            sum(part.events for part in parts),
            sum(part.lost_rows for part in parts),
            sum(part.lost_records for part in parts),
        )

    @property
    def workers(self) -> tuple[ProcessTrace, ...]:
        """The processes that run layers and load adapters."""
        return tuple(p for p in self.processes if p.process.role != "client")

    @cached_property
    def replicas(self) -> tuple[tuple[ProcessTrace, ...], ...]:
        """The workers of each engine. Several engines may serve the same model (data parallelism), each with requests
        and loads of its own."""
        engines: dict[int, list[ProcessTrace]] = {}
        for worker in self.workers:
            engines.setdefault(worker.process.replica, []).append(worker)
        return tuple(tuple(engines[number]) for number in sorted(engines))

    @cached_property
    def parallel(self) -> bool:
        """Whether a worker does not have all layers, or all of each layer."""
        return len(self.workers) > 1 or self._sharded

    @cached_property
    def unjoined(self) -> str:
        """Why the rows of its workers cannot be joined; empty if they can. Each worker has its own part of every layer
        (tensor parallelism), or its own layers (pipeline parallelism)."""
        parallel = any(worker.process.settings.get("tensor_parallel_size", 1) != 1 for worker in self.workers)
        if not parallel or len(self.workers) == 1 or not self.modules:
            return ""
        return "" if self._sharded else f"{len(self.workers)} workers hold shards, and none recorded which"

    @property
    def _sharded(self) -> bool:
        return any(shard for of_worker in self._shards.values() for shard in of_worker.values())

    @cached_property
    def _shards(self) -> Mapping[Path, Shards]:
        """What each worker has of every module, by its folder."""
        return {w.folder: {record.key: record.shard for record in w.of(ModuleRecord)} for w in self.workers}

    @cached_property
    def requests(self) -> tuple[RequestRecord, ...]:
        return tuple(request for process in self.processes for request in process.requests)

    @cached_property
    def answers(self) -> tuple[RequestRecord, ...]:
        """The requests, or those that rows show if an engine kept their tokens and no client recorded them."""
        if self.requests or self.rows is None:
            return self.requests
        return observed_requests(self.rows, {load.load: load.name for load, _ in self.loads})

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
            for load in {load.load: load for load in process.of(Load)}.values():
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
    def request_findings(self) -> tuple[RequestFinding, ...]:
        """What went wrong for requests, by load and rule."""
        return joined_findings(process.of(RequestFinding) for process in self.workers)

    @cached_property
    def outcomes(self) -> Mapping[int, Outcome]:
        """What a server's answers show of a load, by its number."""
        return {outcome.load: outcome for process in self.workers for outcome in process.of(Outcome)}

    @property
    def healthy(self) -> bool:
        """Whether the trace is complete, every load took effect, and every request got what it requested."""
        sound = all(
            self.outcomes[n].sound if (n := load.load) in self.outcomes else ledger.healthy
            for load, ledger in self.loads
        )
        return self.complete and not self.request_findings and sound

    @cached_property
    def modules(self) -> dict[tuple[Any, ...], ModuleRecord]:
        """The module records by load and key."""
        records: dict[tuple[Any, ...], ModuleRecord] = {}
        for process in self.workers:
            for module in process.of(ModuleRecord):
                records.setdefault((module.load, module.key), module)
        return records

    @cached_property
    def fingerprints(self) -> Mapping[int, Mapping[Key, Fingerprint]]:
        """The weights that each load ran with, by its number and by module, as fingerprints (`fingerprint.py`)."""
        return fingerprints_in(self.workers)

    @cached_property
    def file_fingerprints(self) -> Mapping[int, Mapping[Key, Fingerprint]]:
        """The weights in the file of each load."""
        return fingerprints_in(self.workers, in_file=True)

    @cached_property
    def other_tensors(self) -> Mapping[int, Mapping[str, str]]:
        """Digests of the tensors in the file of each load that are no A or B of a followed module, by their names."""
        return other_tensors_in(self.workers)

    @cached_property
    def rows(self) -> Rows | None:
        """All rows, modules of several loads and parts of several workers joined; None if no rows were kept, or if they
        cannot be joined. Requests have the ids of the answers and scored passes in this trace, others those of the
        engine."""
        return self._joined(lambda segment: True)

    def rows_of(self, load: int) -> Rows | None:
        """The rows of one load, at its own modules and rank; None as for `rows`. Load -1 stands for the rows without a
        load. Only the segments of the load are read: all rows of a server may take more memory than there is."""
        rows = self._joined(lambda segment: _has_rows(segment, load), load)
        return None if rows is None else of_load(rows, load)

    def segments_of(self, load: int) -> Iterator[Rows]:
        """The same, a segment at a time, for sums over more rows than fit into memory. A row that was computed twice
        is in two of them, and only the first has the G of its load."""
        if self.parallel:
            if (rows := self.rows_of(load)) is not None:
                yield rows
            return
        for segment in self._segments[self.workers[0].folder] if self.workers else ():
            if _has_rows(segment, load):
                yield of_load(read_rows(segment), load)

    def _joined(self, wanted: Callable[[Segment], bool], load: int | None = None) -> Rows | None:
        """The rows of some segments, of all workers together; and of these only those of a load."""
        if self.unjoined or not self.workers:
            return None
        engines = [rows for workers in self.replicas if (rows := self._of_engine(workers, wanted, load)) is not None]
        return self._named(side_by_side(engines)) if engines else None

    def _of_engine(
        self, workers: Sequence[ProcessTrace], wanted: Callable[[Segment], bool], load: int | None
    ) -> Rows | None:
        """The same of one engine; None if none of its workers has any."""
        parts = []
        for worker in workers:
            rows = self._of_worker([segment for segment in self._segments[worker.folder] if wanted(segment)])
            if rows is None:
                # A pipeline rank may have no module of this adapter; a part that is missing is NaN.
                continue
            parts.append((rows if load is None else of_load(rows, load), self._shards[worker.folder]))
        if not parts:
            return None
        return parts[0][0] if len(parts) == 1 and not any(parts[0][1].values()) else joined_ranks(parts)

    def _named(self, rows: Rows) -> Rows:
        """The rows under the client's ids of requests."""
        answers = {request.id for request in self.requests} | {scored.score.request for scored in self.scores}
        return with_client_ids(rows, answers)

    def _of_worker(self, segments: Sequence[Segment]) -> Rows | None:
        """The rows of these segments, without those that a running process removes in the meantime."""
        while segments:
            try:
                rows = joined(segments)
            except UnreadableFile:
                there = [s for s in segments if not any(worker.has_removed(s.path) for worker in self.workers)]
                if len(there) == len(segments):
                    raise
                segments = there
            else:
                return rows
        return None

    @cached_property
    def _segments(self) -> Mapping[Path, tuple[Segment, ...]]:
        """Those of each worker, by its folder."""
        return {process.folder: tuple(process.opened_segments()) for process in self.workers}

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
        missing = not_measured(self._why_missing(load.load, stations))
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
        cut = max(0, (load.modules or 0) - len(rows))
        return Ledger(self.engine, tuple(rows), load.refused, load.message, reloads=load.reloads, cut=cut)

    def _why_missing(self, load: int, stations: dict[Key, dict[Station, Finding]]) -> str:
        """Why a station of a load that has no record is unknown."""
        running = [worker for worker in self.workers if worker.running]
        if not running:
            return "the recording ended before it was measured"
        for worker in running:
            if worker.process.not_recorded:
                return f"contributions not recorded: {worker.process.not_recorded}"
            if worker.process.keep == "events":
                return "contributions are not recorded (--keep events)"
        if any("applied" in of_module for of_module in stations.values()) or any(load in w.used for w in running):
            return "not measured yet: the recording is still running"
        return "no request has used the adapter yet"


def _has_rows(segment: Segment, load: int) -> bool:
    return load in segment.loads if load >= 0 else load in values(segment.weights, segment.columns["load"])


def open_trace(path: str | Path) -> Trace:
    """Open a trace folder: its newest run, or the run that `path` names (`RUN.lptrace/run-2`).

    Raises:
        UnreadableFile: there is no such folder, no trace in it, or its schema is newer.
    """
    folder = Path(path)
    trace = inside_of(folder)
    if trace is None and not folder.is_dir():
        raise UnreadableFile(f"trace `{folder}` does not exist", _RECORD)
    runs = _runs(trace or folder)
    if trace is not None:
        chosen = next((home for home, name in runs.items() if name == folder), folder)
    else:
        chosen = list(runs)[-1] if runs else folder
    if chosen not in runs:
        if (chosen / CONFIG).is_file():
            raise UnreadableFile(f"`{chosen}` is an adapter, not a trace", command("inspect", chosen))
        raise UnreadableFile(
            f"`{chosen}` is not a trace: it contains neither run.json nor the folder of a process", _RECORD
        )
    run = _run(chosen) if os.path.lexists(chosen / "run.json") else None
    processes = tuple(open_process(home) for home in _homes(chosen))
    return Trace(chosen, run, processes, tuple(name for home, name in runs.items() if home != chosen))


def _runs(trace: Path) -> dict[Path, Path]:
    """The folders of the runs in a trace folder that contain anything, in order, each with the path that opens it."""
    later = later_runs(trace)
    paths = {trace: trace / "run-1" if later else trace} | {run: run for run in later}
    return {run: name for run, name in paths.items() if os.path.lexists(run / "run.json") or _homes(run)}


def _run(folder: Path) -> Run:
    path = inside(folder, "run.json")
    run = document(path, Run)
    refuse_newer(path, run.schema)
    refuse_deep(path, run.spec.options)
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
