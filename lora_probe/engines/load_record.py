"""The record of one load of an adapter while an engine runs it. It is the same for every engine.

In: the adapter (its files, or the tensors that were pushed), the rows that ran, samples of x and delta. Out: the load's
records in the trace, from `stored` (judged before the engine reads the adapter) to `agrees` (recomputed from its
tensors on the sampled rows), and what went wrong for requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.engines.file_weights import digests_of_others, fingerprints_of
from lora_probe.engines.request_findings import RequestFindings
from lora_probe.engines.sampled import ENOUGH_ROWS, Counters, common_factor, count, relative_error
from lora_probe.ledger import OK, STATIONS, Finding, Ledger, Row, Station, completed, worse
from lora_probe.names import Key, name_modules, path_of
from lora_probe.precision import FLOATS, coarser, finite
from lora_probe.precision import agrees as agrees_tolerance
from lora_probe.recording import Floats, Load, ModuleRecord, Shard, TraceWriter, WeightsRecord
from lora_probe.recording.fingerprint import Fingerprint, weights_record
from lora_probe.rules.lp5_loading import not_measured
from lora_probe.rules.lp6_applying import (
    contamination,
    kernel_differs,
    never_applied,
    not_finite_output,
    not_in_its_slot,
    other_weights_in_prefix_cache,
    rows_missed,
)
from lora_probe.rules.stored import Expected

NO_SHARDS: Mapping[Key, Shard | None] = {}
_NOT_YET = not_measured("not measured yet")


class LoadRecord:
    """Writes one load's records, and counts its rows until `finish`. Its state changes only through its methods."""

    def __init__(
        self, writer: TraceWriter, load: Load, adapter: Adapter, expected: tuple[Expected, ...], dtype: str
    ) -> None:
        self.adapter, self.expected = adapter, expected
        self._writer, self._dtype = writer, dtype
        self._running: WeightsRecord | None = None
        self._load = replace(load, modules=len(expected))
        self._requested = 0
        self._requests = RequestFindings(writer, load.load, load.name)
        self._began: float | None = None
        self._reported = 0.0
        self._urgent = False
        self._counters: dict[Key, Counters] = {}
        self._shrinks: dict[Key, Counters] = {}
        self._ended: set[Key] = set()
        self._elsewhere: set[Key] = set()
        self._written: dict[tuple[Station, Key], Finding] = {}
        self._findings: dict[Key, dict[Station, Finding]] = {}
        self.changes = 0
        """How often the ledger, or the load itself, has changed."""

    @property
    def load(self) -> Load:
        return self._load

    @property
    def number(self) -> int:
        return self._load.load

    def ended(self, key: Key) -> bool:
        """Whether nothing more is written for a module: it is absent at some station, or another rank judges it."""
        return key in self._ended

    @property
    def requested(self) -> int:
        """How many rows requested the load so far."""
        return self._requested

    def has_run(self, key: Key) -> bool:
        """Whether any row of a module was seen."""
        return key in self._counters and self._counters[key].applied > 0

    def announce(self, engine_as: Mapping[Key, str], shards: Mapping[Key, Shard | None] = NO_SHARDS) -> None:
        """Write the load, its rows, and `stored`. A row without a pair in the file is absent at every station. `shards`
        are what this rank has of each module."""
        self._writer.record(self._load)
        for row in self.expected:
            pair = row.entry
            self._writer.record(
                ModuleRecord(
                    load=self.number,
                    module=row.key[0],
                    parameter=row.key[1],
                    expert=row.key[2],
                    expected_by=list(row.expected_by),
                    stored_as=pair.stored_as if pair else None,
                    engine_as=engine_as.get(row.key),
                    dtype=_dtype_of(pair) if pair is not None else "",
                    rank=pair.rank if pair else None,
                    scaling=pair.scaling if pair else None,
                    norm=finite(row.spectrum.norm) if row.spectrum else None,
                    effective_rank=finite(row.spectrum.effective_rank) if row.spectrum else None,
                    shard=shards.get(row.key),
                )
            )
        stored = fingerprints_of(self.adapter, self.expected)
        others = digests_of_others(self.adapter, self.expected, stored)
        self._writer.record(weights_record(self.number, stored, in_file=True, others=others))
        self._station_of("stored", {row.key: row.stored for row in self.expected})
        absent = [row.key for row in self.expected if row.entry is None]
        self._ended.update(absent)
        for station in STATIONS[1:]:
            self._station_of(station, dict.fromkeys(absent, Finding("absent")))

    def ledger(self, engine: str, stations: tuple[Station, ...] = STATIONS) -> Ledger:
        """The ledger so far of the modules that this rank judges, as `Trace.loads` reads it: of several findings the
        worst counts, and a station without any is unknown. May be called from another thread."""
        rows = [
            Row(
                row.key,
                completed(dict(self._findings.get(row.key, {})), _NOT_YET, stations),
                row.expected_by,
                row.entry.stored_as if row.entry else None,
            )
            for row in self.expected
            if row.key not in self._elsewhere
        ]
        return Ledger(engine, tuple(rows), self._load.refused, self._load.message)

    def event(self, stage: str, text: str) -> None:
        """Write a step of the timeline that is about this load."""
        self._writer.event(stage, f"{self._load.name}: {text}")

    def refused(self, message: str) -> None:
        """The engine refuses the adapter, with its own message."""
        self._replace(refused=True, message=message)

    def activated(self, slot: int | None, logged: list[str]) -> None:
        """The adapter is ready to run; `logged` contains the engine's log lines until then."""
        self._replace(slot=slot, said=logged)

    def reloaded(self) -> None:
        """The engine reads the unchanged adapter again, because a request has load_inplace.

        That may happen in every step, so the number is written when it is a power of two, and by `finish`.
        """
        self._load = replace(self._load, reloads=self._load.reloads + 1)
        if self._load.reloads.bit_count() == 1:
            self._writer.record(self._load)

    def running_with(self, fingerprints: Mapping[Key, Fingerprint]) -> None:
        """Write the weights that the modules run with, as fingerprints, when its slots were filled. A server may fill
        them again and again, with the same weights."""
        record = weights_record(self.number, fingerprints) if fingerprints else None
        if record is not None and record != self._running:
            self._writer.record(record)
            self._running = record

    def leave_to_another_rank(self, keys: Iterable[Key]) -> None:
        """Another rank judges these modules: from now on nothing is written for them."""
        self._elsewhere.update(keys)
        self._ended |= self._elsewhere

    def station(self, station: Station, findings: Mapping[Key, Finding]) -> None:
        """Write one station's findings, unless they were written before. Nothing more is written for an absent
        module."""
        self._write_new(station, findings)
        self._ended.update(key for key, finding in findings.items() if finding.value == "absent")

    @property
    def contaminated_rows(self) -> int:
        """How many rows got this load's contribution without asking for an adapter."""
        return self._requests.rows(contamination)

    @property
    def stale_rows(self) -> int:
        """How many rows asked for this adapter and ran with a slot that does not hold it."""
        return self._requests.rows(not_in_its_slot)

    def ran(self, requested: int, keys: Iterable[Key], applied: int) -> None:
        """Rows of one step: `requested` rows requested this load, and `applied` of them ran with it at `keys`."""
        self._requested += requested
        self._urgent = self._urgent or applied != requested
        for key in keys:
            self._counters_of(key).applied += applied

    def routed(self, keys: Iterable[Key], requested: int, applied: int) -> None:
        """The same for experts: of the rows that requested this load, `requested` were routed to `keys`."""
        for key in keys:
            counters = self._counters_of(key)
            counters.routed = (counters.routed or 0) + requested
            counters.applied += applied

    def contaminated(self, rows: Mapping[str, int]) -> None:
        """Rows of one step, by request, that asked for no adapter and got this load's contribution."""
        self._requests.add(contamination, rows)

    def not_in_its_slot(self, rows: Mapping[str, int]) -> None:
        """Rows of one step, by request, that asked for this adapter and ran with a slot that does not hold it."""
        self._requests.add(not_in_its_slot, rows)

    def cached_with_other_weights(self, positions: Mapping[str, int]) -> None:
        """Positions of requests for this load that other weights of the same name computed."""
        self._requests.add(other_weights_in_prefix_cache, positions)

    def sample(
        self, key: Key, x: Floats, delta: Floats, a: Floats, b: Floats, scaling: float, bias: Floats | None = None
    ) -> None:
        """Compare the kernel's output with s·((x·Aᵀ)·Bᵀ + bias) from the file. `x: [rows, in]`, `delta: [rows, out]`,
        `bias: [out]`."""
        reference: Floats = np.asarray((x @ a.T) @ b.T * np.float32(scaling), np.float32)
        # Round-off is at most a share of this: the same product without any cancellation.
        size = np.asarray((np.abs(x) @ np.abs(a).T) @ np.abs(b).T * np.float32(abs(scaling)), np.float32)
        if bias is not None:
            reference, size = reference + bias * np.float32(scaling), size + np.abs(bias * np.float32(scaling))
        self.compare(key, delta, reference, size)

    def sample_shrink(self, key: Key, x: Floats, shrink: Floats, a: Floats) -> None:
        """Compare this rank's part of x·Aᵀ, where the contribution is made of those of all ranks. It is judged apart: a
        contribution is much smaller. `x: [rows, in]`, `shrink: [rows, r]`, `a: [r, in]`."""
        size = np.asarray(np.abs(x) @ np.abs(a).T, np.float32)
        self._count(self._shrinks.setdefault(key, Counters()), shrink, np.asarray(x @ a.T, np.float32), size)

    def compare(self, key: Key, delta: Floats, reference: Floats, size: Floats) -> None:
        """Compare a contribution with what it should be, `[rows, out]` each. `size` is what round-off is a share of."""
        self._count(self._counters_of(key), delta, reference, size)

    def _count(self, counters: Counters, delta: Floats, reference: Floats, size: Floats) -> None:
        count(counters, delta, reference, size)
        self._urgent = self._urgent or not counters.finite or counters.worst_row > agrees_tolerance(self._dtype)

    def so_far(self) -> None:
        """Write the findings of `applied` and `agrees` so far, if they are new, and what went wrong for requests.

        Servers are usually killed without warning, so the last stations cannot wait for the end. Of several records
        the worst counts, so only final findings are written: never that a module has not run yet.
        """
        self.report_requests()
        self._reported, self._urgent = time.monotonic(), False
        applied: dict[Key, Finding] = {}
        agrees: dict[Key, Finding] = {}
        for key, counters in self._counters.items():
            if key in self._ended or not counters.applied:
                continue
            applied[key] = self._applied(counters)
            if counters.sampled >= ENOUGH_ROWS:
                agrees[key] = self._agrees(key, counters)
        both: tuple[tuple[Station, dict[Key, Finding]], ...] = (("applied", applied), ("agrees", agrees))
        for station, findings in both:
            self._write_new(station, findings)

    def report_if_due(self) -> None:
        """`so_far` after a step of an engine that runs many: at first after every step, later about once a second, and
        at once if something is wrong."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        if self._urgent or now - self._reported >= min(1.0, (now - self._began) / 10):
            self.so_far()

    def report_requests(self) -> None:
        """Write what went wrong for requests so far, if it has grown enough."""
        self._requests.write()

    def finish_requests(self) -> None:
        """Write the last totals of what went wrong for requests, of a refused load too."""
        self._requests.write(final=True)

    def finish(
        self, unmeasured: Callable[[Key], str | None], unjudged: Callable[[Key], str | None] = lambda _: None
    ) -> None:
        """Write `applied` and `agrees`.

        `unmeasured` returns why a module's rows were not recorded, None if they were; `unjudged` returns why its
        contribution has no reference, None if it has one.
        """
        if self._load.reloads:
            self._writer.record(self._load)
        applied: dict[Key, Finding] = {}
        agrees: dict[Key, Finding] = {}
        facts: dict[str, list[float]] = {}
        for row in self.expected:
            if row.key in self._ended:
                continue
            why = unmeasured(row.key) or (None if self._requested else "no request used the adapter")
            if why is not None:
                applied[row.key] = agrees[row.key] = not_measured(why)
                continue
            counters = self._counters_of(row.key)
            applied[row.key] = self._applied(counters)
            if applied[row.key].value == "absent":
                continue
            if applied[row.key].value == "unknown":
                agrees[row.key] = applied[row.key]
                continue
            if (reason := unjudged(row.key)) is not None:
                agrees[row.key] = not_measured(reason)
                continue
            agrees[row.key] = self._agrees(row.key, counters)
            facts[path_of(row.key)] = [relative_error(counters), counters.worst_row, counters.sampled]
        self._station_of("applied", applied)
        self._station_of("agrees", agrees)
        if facts:
            worst, (error, *_) = max(facts.items(), key=lambda item: item[1][0])
            where, source = name_modules([worst]), self.adapter.source
            text = f"recomputed {len(facts)} modules from {source}: worst relative error {error:.2g}, {where}"
            self._writer.event("agree", text, load=self.number, errors=facts, tolerance=agrees_tolerance(self._dtype))

    def _applied(self, counters: Counters) -> Finding:
        requested = self._requested if counters.routed is None else counters.routed
        if not requested:
            return not_measured("no token of a request with the adapter reached it")
        if counters.applied == 0:
            return never_applied(requested)
        return rows_missed(counters.applied, requested) if counters.applied != requested else OK

    def _agrees(self, key: Key, counters: Counters) -> Finding:
        finding, shrink = self._judged(counters), self._shrinks.get(key)
        return finding if shrink is None else worse(finding, self._judged(shrink))

    def _judged(self, counters: Counters) -> Finding:
        limit = agrees_tolerance(self._dtype)
        if not counters.finite:
            return not_finite_output()
        if not counters.sampled:
            return not_measured("no row of this module was sampled")
        error = relative_error(counters)
        if error > limit and counters.sampled < ENOUGH_ROWS and counters.error <= limit**2 * counters.bound:
            return not_measured(f"{counters.sampled} sampled rows are too few to judge an error of {error:.2g}")
        return kernel_differs(error, limit, counters.sampled, common_factor(counters, limit)) if error > limit else OK

    def _counters_of(self, key: Key) -> Counters:
        return self._counters.setdefault(key, Counters())

    def _replace(self, **changes: Any) -> None:
        self._load = replace(self._load, **changes)
        self.changes += 1
        self._writer.record(self._load)

    def _write_new(self, station: Station, findings: Mapping[Key, Finding]) -> None:
        """Write the findings that differ from the last ones."""
        new = {key: finding for key, finding in findings.items() if self._written.get((station, key)) != finding}
        self._written |= {(station, key): finding for key, finding in new.items()}
        self._station_of(station, new)

    def _station_of(self, station: Station, findings: Mapping[Key, Finding]) -> None:
        groups: dict[Finding, list[Key]] = {}
        for key, finding in findings.items():
            groups.setdefault(finding, []).append(key)
            stations = self._findings.setdefault(key, {})
            before = stations.get(station)
            if before is None or worse(before, finding) != before:
                stations[station] = finding
                self.changes += 1
        for finding, keys in groups.items():
            self._writer.station(self.number, station, finding, keys)


def _dtype_of(pair: AdapterModule) -> str:
    """The coarser dtype of A and B in the file; empty if they are no floats."""
    return coarser(*(half.dtype for half in (pair.a, pair.b) if half is not None and half.dtype in FLOATS))
