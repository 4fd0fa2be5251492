"""A recording by adapter: the loads of each adapter with their ledgers, and the state of a recording that still runs.

In: a `Trace`. Out: an `AdapterLoads` for each adapter, with a `LoadEntry` for each load; and whether the recording
still runs. Only the headers of segments are read here, no rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_probe.errors import ProbeError
from lora_probe.ledger import Ledger, Station, headline
from lora_probe.names import Key, in_words
from lora_probe.recording import Load, LoadEvent, Outcome, RequestFinding, StationRecord, Trace
from lora_probe.rules.lp5_loading import not_measured

GRAPHS = "graphs"
"""The stage of the events that count the rows which ran in captured graphs."""


@dataclass(frozen=True)
class LoadEntry:
    """One load of an adapter. `at`: seconds from the start of the recording to the load. `used`: rows of it are on
    disk. `waiting` is why some stations of a running recording are not measured yet, empty if none is. `graphs` is the
    last report on rows that ran in captured graphs. `findings` are what went wrong for requests while the load was
    active; the ledger does not contain it. `outcome` is what the answers of a server show, whose layers nobody sees."""

    load: Load
    ledger: Ledger
    at: float | None
    used: bool
    waiting: str = ""
    graphs: LoadEvent | None = None
    findings: tuple[RequestFinding, ...] = ()
    outcome: Outcome | None = None

    @property
    def number(self) -> int:
        return self.load.load

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong with it: it took effect, or a running recording has not measured all of it yet."""
        if self.outcome is not None:
            return self.outcome.sound
        return self.ledger.healthy or self._unmeasured

    @property
    def _unmeasured(self) -> bool:
        faults = self.ledger.count("lost") + self.ledger.count("wrong")
        return bool(self.waiting and self.ledger.rows) and not self.ledger.refused and not faults

    @property
    def headline(self) -> str:
        """The result so far in one sentence."""
        if self.outcome is not None:
            code = f" ({self.outcome.code})" if self.outcome.code else ""
            return f"{self.outcome.message}{code}"
        if self.ledger.healthy or not self._unmeasured:
            return headline(self.ledger)
        placed = sum(row.stations["placed"].value == "ok" for row in self.ledger.rows)
        return f"{placed} of {len(self.ledger.rows)} modules are placed; {self.waiting}"


@dataclass(frozen=True)
class AdapterLoads:
    """One adapter by its name, with its loads in order; at least one."""

    name: str
    loads: tuple[LoadEntry, ...]

    @property
    def newest(self) -> LoadEntry:
        """The last load that was not refused, as the engine still serves it; the last one if all were."""
        return next((entry for entry in reversed(self.loads) if not entry.ledger.refused), self.loads[-1])

    @property
    def others(self) -> tuple[LoadEntry, ...]:
        return tuple(entry for entry in self.loads if entry is not self.newest)


def adapters(trace: Trace) -> tuple[AdapterLoads, ...]:
    """The adapters in the order of their first load."""
    by_name: dict[str, list[LoadEntry]] = {}
    for entry in _entries(trace):
        by_name.setdefault(entry.load.name, []).append(entry)
    return tuple(AdapterLoads(name, tuple(entries)) for name, entries in by_name.items())


def selected(
    every: Sequence[AdapterLoads], name: str | None = None, load: int | None = None
) -> tuple[AdapterLoads, ...]:
    """The adapter of this name, and only the load of this number.

    Raises:
        ProbeError: there is no such adapter, or no such load.
    """
    chosen = tuple(adapter for adapter in every if name in (None, adapter.name))
    if not chosen and name is not None:
        names = [f"`{adapter.name}`" for adapter in every]
        there = f"adapters in this trace: {in_words(names)}" if names else "no adapter was loaded in this trace"
        raise ProbeError(f"no adapter `{name}` in this trace", there)
    if load is None:
        return chosen
    for adapter in chosen:
        if entries := tuple(entry for entry in adapter.loads if entry.number == load):
            return (AdapterLoads(adapter.name, entries),)
    numbers = sorted(entry.number for adapter in chosen for entry in adapter.loads)
    of_adapter = f" of `{name}`" if name is not None else ""
    there = f"loads{of_adapter} in this trace: {_some(numbers)}" if numbers else "no adapter was loaded in this trace"
    raise ProbeError(f"no load {load}{of_adapter} in this trace", there)


def _some(numbers: Sequence[int], most: int = 20) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


def unfinished(trace: Trace) -> tuple[str, ...]:
    """The processes whose recording has ended and is not complete; those that still run are left out."""
    alive = {process.folder.name for process in trace.processes if process.running}
    return tuple(name for name in trace.unclosed if name not in alive)


def recorded_rows(trace: Trace) -> int:
    """How many rows are on disk. Of the workers of one engine, each of which has all rows, the first one's are
    counted."""
    return sum(segment.count for workers in trace.replicas for segment in workers[0].opened_segments())


def _entries(trace: Trace) -> Iterator[LoadEntry]:
    used = {load for worker in trace.workers for segment in worker.opened_segments() for load in segment.loads}
    times, graphs, live = _times(trace), _graphs(trace), trace.running
    findings: dict[int, list[RequestFinding]] = {}
    for finding in trace.request_findings:
        findings.setdefault(finding.load, []).append(finding)
    unknown = _recorded_unknown(trace) if live else {}
    for load, ledger in trace.loads:
        number = load.load
        of_requests = tuple(findings.get(number, ()))
        entry = LoadEntry(load, ledger, times.get(number), number in used, "", graphs.get(number), of_requests)
        entry = replace(entry, outcome=trace.outcomes.get(number))
        yield _so_far(trace, entry, unknown.get(number, frozenset())) if live else entry


def _so_far(trace: Trace, entry: LoadEntry, recorded: Collection[tuple[Station, Key]]) -> LoadEntry:
    """An entry of a running recording. What is not measured yet has not failed: the ledger states that the load waits
    for rows, unless the process recorded (`recorded`) why it does not measure a station."""
    worker = trace.workers[0].process
    if worker.not_recorded:
        why = f"contributions are not recorded: {worker.not_recorded}"
    elif worker.keep == "events":
        why = "contributions are not recorded at level events"
    else:
        why = "not measured yet" if entry.used else "no request yet"
    waits = False
    rows = []
    for row in entry.ledger.rows:
        stations = dict(row.stations)
        for station, finding in row.stations.items():
            if finding.value == "unknown" and (station, row.key) not in recorded:
                stations[station] = not_measured(why)
                waits = True
        rows.append(replace(row, stations=stations))
    waiting = why if waits and not worker.not_recorded else ""
    return replace(entry, ledger=replace(entry.ledger, rows=tuple(rows)), waiting=waiting)


def _recorded_unknown(trace: Trace) -> Mapping[int, set[tuple[Station, Key]]]:
    """By load: what a process recorded as not measured."""
    stations: dict[int, set[tuple[Station, Key]]] = {}
    for worker in trace.workers:
        for record in worker.of(StationRecord):
            if record.value == "unknown":
                stations.setdefault(record.load, set()).update((record.station, key) for key in record.keys)
    return stations


def _times(trace: Trace) -> Mapping[int, float]:
    """The time of each load on the first rank of its engine: that of the first event after its record."""
    times: dict[int, float] = {}
    for worker, *_ in trace.replicas:
        waiting: list[int] = []
        for record in worker.records:
            if isinstance(record, Load) and record.load not in times:
                waiting.append(record.load)
            elif isinstance(record, LoadEvent) and waiting:
                times |= dict.fromkeys(waiting, record.at)
                waiting = []
    return times


def _graphs(trace: Trace) -> Mapping[int, LoadEvent]:
    """The last report on captured graphs of each load."""
    return {
        event.facts["load"]: event
        for event in trace.events
        if event.stage == GRAPHS and isinstance(event.facts.get("load"), int)
    }
