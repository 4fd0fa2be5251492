"""One load of an adapter while an engine runs it: the part that is the same in every engine.

In: the adapter, the rows that ran, samples of x and delta. Out: the load's records in the trace, from `stored`
(judged from the file before the engine sees it) to `agrees` (recomputed from the file on the sampled rows).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.ledger import OK, Finding
from lora_probe.names import Key
from lora_probe.precision import agrees as agrees_tolerance
from lora_probe.recording import DECODE, PREFILL, Floats, Load, ModuleRecord, TraceWriter
from lora_probe.rules.lp5_loading import not_measured
from lora_probe.rules.lp6_applying import contamination, kernel_differs, never_applied, not_finite_output, rows_missed
from lora_probe.rules.stored import Expected

SAMPLED = {PREFILL: 4, DECODE: 2}
"""Rows of each request on which `agrees` is measured, by phase."""

ENOUGH_ROWS = 4
"""Below this many sampled rows a relative error says little: x·A of a single row may cancel to almost nothing."""


@dataclass
class _Tally:
    """What is summed up for one module."""

    right: int = 0
    contaminated: int = 0
    sampled: int = 0
    error: float = 0.0
    reference: float = 0.0
    worst_row: float = 0.0
    bound: float = 0.0
    finite: bool = True


@dataclass
class Account:
    """Writes one load's records, and tallies its rows until `finish`."""

    writer: TraceWriter
    load: Load
    adapter: Adapter
    expected: tuple[Expected, ...]
    dtype: str
    asked: int = 0
    tallies: dict[Key, _Tally] = field(default_factory=dict)
    gone: set[Key] = field(default_factory=set)
    _told: dict[tuple[str, Key], Finding] = field(default_factory=dict)

    def announce(self, engine_as: Mapping[Key, str]) -> None:
        """Write the load, its rows, and `stored`. A row without a pair in the file is absent at every station."""
        self.writer.record(self.load)
        for row in self.expected:
            pair = row.entry
            self.writer.record(
                ModuleRecord(
                    load=self.load.load,
                    module=row.key[0],
                    parameter=row.key[1],
                    expert=row.key[2],
                    expected_by=list(row.expected_by),
                    stored_as=pair.stored_as if pair else None,
                    engine_as=engine_as.get(row.key),
                    rank=pair.rank if pair else None,
                    scaling=pair.scaling if pair else None,
                    norm=_number(row.spectrum.norm) if row.spectrum else None,
                    effective_rank=_number(row.spectrum.effective_rank) if row.spectrum else None,
                )
            )
        self._station_of("stored", {row.key: row.stored for row in self.expected})
        absent = [row.key for row in self.expected if row.entry is None]
        self.gone.update(absent)
        for station in ("read", "placed", "applied", "agrees"):
            if absent:
                self.writer.station(self.load.load, station, Finding("absent"), absent)

    def station(self, station: str, findings: Mapping[Key, Finding]) -> None:
        """Write one station's findings; an absent module has ended its journey."""
        self._station_of(station, findings)
        self.gone.update(key for key, finding in findings.items() if finding.value == "absent")

    def ran(self, keys: Iterable[Key], right: int, contaminated: Mapping[Key, int]) -> None:
        """Rows of one step: `right` of them ran with this load, and some that should not have."""
        for key in keys:
            self._tally(key).right += right
        for key, rows in contaminated.items():
            self._tally(key).contaminated += rows

    def has_run(self, key: Key) -> bool:
        """Whether any row of a module was seen."""
        return self._tally(key).right > 0

    def sample(self, key: Key, x: Floats, delta: Floats, a: Floats, b: Floats, scaling: float) -> None:
        """Compare what the kernel wrote with s·(x·Aᵀ)·Bᵀ of the file. `x: [rows, in]`, `delta: [rows, out]`."""
        tally = self._tally(key)
        reference = (x @ a.T) @ b.T * np.float32(scaling)
        tally.sampled += len(x)
        if not (np.isfinite(delta).all() and np.isfinite(reference).all()):
            tally.finite = False
            return
        errors = np.linalg.norm(delta - reference, axis=-1)
        sizes = np.linalg.norm(reference, axis=-1)
        # What round-off could at most be a share of: the same product without any cancellation.
        bound = np.linalg.norm((np.abs(x) @ np.abs(a).T) @ np.abs(b).T * np.float32(abs(scaling)), axis=-1)
        tally.bound += float(np.square(bound, dtype=np.float64).sum())
        tally.error += float(np.square(errors, dtype=np.float64).sum())
        tally.reference += float(np.square(sizes, dtype=np.float64).sum())
        rows = sizes > 0
        if rows.any():
            tally.worst_row = max(tally.worst_row, float((errors[rows] / sizes[rows]).max()))

    def so_far(self) -> None:
        """Write what `applied` and `agrees` show until now, where that is new.

        A server's worker is ended without a word, so the last stations cannot wait for the end. Of several records
        the worst counts, so only what may stand is written: never that nothing has happened yet.
        """
        applied: dict[Key, Finding] = {}
        agrees: dict[Key, Finding] = {}
        for key, tally in self.tallies.items():
            if key in self.gone or not (tally.right or tally.contaminated):
                continue
            applied[key] = self._applied(tally)
            if tally.sampled >= ENOUGH_ROWS:
                agrees[key] = self._agrees(tally)
        for station, findings in (("applied", applied), ("agrees", agrees)):
            new = {key: finding for key, finding in findings.items() if self._told.get((station, key)) != finding}
            self._told |= {(station, key): finding for key, finding in new.items()}
            self._station_of(station, new)

    def finish(
        self, unmeasured: Callable[[Key], str | None], unjudged: Callable[[Key], str | None] = lambda _: None
    ) -> None:
        """Write `applied` and `agrees`.

        `unmeasured` says why a module's rows were not recorded, if they were not; `unjudged` why its contribution has
        no reference, if it has none.
        """
        applied: dict[Key, Finding] = {}
        agrees: dict[Key, Finding] = {}
        facts: dict[str, list[float]] = {}
        for row in self.expected:
            if row.key in self.gone:
                continue
            why = unmeasured(row.key) or (None if self.asked else "no request asked for the adapter")
            if why is not None:
                applied[row.key] = agrees[row.key] = not_measured(why)
                continue
            tally = self._tally(row.key)
            applied[row.key] = self._applied(tally)
            if applied[row.key].value == "absent":
                continue
            if (reason := unjudged(row.key)) is not None:
                agrees[row.key] = not_measured(reason)
                continue
            agrees[row.key] = self._agrees(tally)
            facts[row.module] = [_relative(tally), tally.worst_row, tally.sampled]
        self._station_of("applied", applied)
        self._station_of("agrees", agrees)
        if facts:
            worst = max(facts.items(), key=lambda item: item[1][0])
            self.writer.event(
                "agree",
                f"recomputed {len(facts)} modules from the file: worst relative error {worst[1][0]:.2g}",
                module=worst[0],
                errors=facts,
                tolerance=agrees_tolerance(self.dtype),
            )

    def _applied(self, tally: _Tally) -> Finding:
        if tally.contaminated:
            return contamination(tally.contaminated)
        if tally.right == 0:
            return never_applied(self.asked)
        return rows_missed(tally.right, self.asked) if tally.right != self.asked else OK

    def _agrees(self, tally: _Tally) -> Finding:
        limit = agrees_tolerance(self.dtype)
        if not tally.finite:
            return not_finite_output()
        if not tally.sampled:
            return not_measured("no row of this module was sampled")
        error = _relative(tally)
        if error > limit and tally.sampled < ENOUGH_ROWS and tally.error <= limit**2 * tally.bound:
            return not_measured(f"{tally.sampled} sampled rows are too few to judge an error of {error:.2g}")
        return kernel_differs(error, limit, tally.sampled) if error > limit else OK

    def _tally(self, key: Key) -> _Tally:
        return self.tallies.setdefault(key, _Tally())

    def _station_of(self, station: str, findings: Mapping[Key, Finding]) -> None:
        groups: dict[Finding, list[Key]] = {}
        for key, finding in findings.items():
            groups.setdefault(finding, []).append(key)
        for finding, keys in groups.items():
            self.writer.station(self.load.load, station, finding, keys)  # type: ignore[arg-type]


def _relative(tally: _Tally) -> float:
    """Error over all sampled rows of a module; a zero reference with a non-zero delta is infinitely wrong."""
    if tally.reference == 0:
        return 0.0 if tally.error == 0 else float("inf")
    return float(np.sqrt(tally.error / tally.reference))


def relative_difference(held: Any, wanted: Any) -> float | None:
    """How far what an engine holds lies from a replay of the file, two torch tensors of one dtype; None where they are
    the same bit for bit (NaN for NaN), infinity where even their shapes differ."""
    if held.shape != wanted.shape:
        return float("inf")
    if not (held.nan_to_num() != wanted.nan_to_num()).any():
        return None
    return float((wanted.float() - held.float()).norm() / wanted.float().norm().clamp(min=1e-30))


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


class Sampler:
    """Picks the rows on which `agrees` is measured: the first few of each request and phase."""

    REMEMBERED = 4096

    def __init__(self) -> None:
        self._taken: dict[tuple[str, int], int] = {}

    def pick(self, requests: list[str], phases: list[int]) -> list[int]:
        """Row numbers of one step. `requests` and `phases` describe its rows."""
        picked = []
        for number, at in enumerate(zip(requests, phases, strict=True)):
            taken = self._taken.get(at, 0)
            if taken < SAMPLED[at[1]]:
                self._taken[at] = taken + 1
                picked.append(number)
        while len(self._taken) > self.REMEMBERED:
            # The oldest requests have long ended.
            del self._taken[next(iter(self._taken))]
        return picked


def placed_digest(a: Floats, scaled_b: Floats) -> str:
    """What two runs compare to know that they multiply with the same numbers: A and s·B in float32."""
    digest = hashlib.sha256(np.ascontiguousarray(a).tobytes())
    digest.update(np.ascontiguousarray(scaled_b).tobytes())
    return digest.hexdigest()[:16]
