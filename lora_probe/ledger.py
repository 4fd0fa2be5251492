"""The ledger: what became of every pair of an adapter in one engine.

In: for each module a `Finding` at each of the five stations, or, predicted from files, at the first three. Out: its
fate, the headline sentence, and the JSON that every command writes. A later station may be better than an earlier one:
a module may be wrong at `stored` and still ok at `placed` and `applied`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lora_probe.names import Key, Universe, name_modules, path_of
from lora_probe.presented import Presented

Station = Literal["stored", "read", "placed", "applied", "agrees"]
Value = Literal["ok", "wrong", "absent", "unknown"]
Fate = Literal["took effect", "wrong", "lost", "unknown"]

STATIONS: tuple[Station, ...] = ("stored", "read", "placed", "applied", "agrees")
_VALUES: dict[Fate, Value] = {"took effect": "ok", "wrong": "wrong", "lost": "absent", "unknown": "unknown"}
"""The value that decides a fate."""
_GRAVITY: dict[Value, int] = {"unknown": 0, "ok": 1, "absent": 2, "wrong": 3}


@dataclass(frozen=True)
class Finding:
    """What one station shows of one module: a value and, unless it is `ok`, the reason (with a rule's code, if any).

    `field` is the key of adapter_config.json that caused it; a finding without a field is about the tensors.
    `predicate`: the message continues a sentence that begins with the names of modules. `hint`: what to do, if that is
    not the rule's own hint."""

    value: Value
    code: str = ""
    message: str = ""
    field: str | None = None
    predicate: bool = False
    hint: str = ""


OK = Finding("ok")


def worse(first: Finding, second: Finding) -> Finding:
    """The finding of the two that decides; the first if they weigh the same."""
    return second if _GRAVITY[second.value] > _GRAVITY[first.value] else first


def completed(
    recorded: Mapping[Station, Finding], missing: Finding, stations: tuple[Station, ...] = STATIONS
) -> dict[Station, Finding]:
    """The finding of each of `stations`: `missing` where none was recorded, except that a module stays absent."""
    result: dict[Station, Finding] = {}
    gone = False
    for station in stations:
        result[station] = recorded.get(station) or (Finding("absent") if gone else missing)
        gone = gone or (result[station].value == "absent" and station != "stored")
    return result


@dataclass(frozen=True)
class Row:
    """One module of the ledger. `expected_by` lists where it is expected from: the config, the file, or both. The
    `stations` of a predicted row end with `placed`."""

    key: Key
    stations: Mapping[Station, Finding]
    expected_by: tuple[str, ...] = ()
    stored_as: str | None = None
    engine_as: str | None = None

    @property
    def module(self) -> str:
        return self.key[0]

    @property
    def fate(self) -> Fate:
        values = [finding.value for finding in self.stations.values()]
        if "absent" in values:
            return "lost"
        if "wrong" in values:
            return "wrong"
        last: Station = "applied" if "applied" in self.stations else "placed"
        return "took effect" if self.stations[last].value == "ok" else "unknown"

    @property
    def decisive(self) -> tuple[Station, Finding] | None:
        """The station that decided the fate, and what it showed; None for a module that took effect."""
        fate = self.fate
        for station, finding in self.stations.items():
            if fate != "took effect" and finding.value == _VALUES[fate]:
                return station, finding
        return None


@dataclass(frozen=True, repr=False)
class Ledger(Presented):
    """All modules of one load of an adapter in one engine, or the engine's refusal of the whole adapter (`message`, and
    the `code` of the rule for it). `universe` holds the modules of the base model as well, if they are known. `reloads`
    counts how often the engine read the unchanged adapter again, and `cut` the modules whose records are missing
    because the trace was cut."""

    engine: str
    rows: tuple[Row, ...]
    refused: bool = False
    message: str = ""
    code: str = "LP401"
    predicted: bool = False
    reloads: int = 0
    universe: Universe | None = field(default=None, repr=False, compare=False)
    cut: int = 0

    @cached_property
    def names(self) -> Universe:
        """The modules among which a short name in a sentence about this ledger is unique."""
        return self.universe or Universe(tuple(path_of(row.key) for row in self.rows))

    def count(self, fate: Fate) -> int:
        return sum(row.fate == fate for row in self.rows)

    @property
    def healthy(self) -> bool:
        """Whether there are modules and all of them took effect."""
        return bool(self.rows) and not self.refused and not self.cut and self.count("took effect") == len(self.rows)


def headline(ledger: Ledger) -> str:
    """The result of a run in one sentence."""
    if ledger.refused:
        return f"refused by {ledger.engine}: {ledger.message} ({ledger.code})"
    total, unknown = len(ledger.rows) + ledger.cut, [row for row in ledger.rows if row.fate == "unknown"]
    if ledger.predicted and not total:
        return "no modules in the files"
    every = clauses(ledger)
    if ledger.predicted and unknown and not ledger.count("took effect"):
        # Nobody has asked about an effect on an unknown base: that must not read like a loss.
        losses = [clause.with_code for clause in every if clause.finding.value != "unknown"]
        reasons = [row.decisive[1].message for row in unknown if row.decisive]
        effect = f"; effect of the other {len(unknown)} unknown" if losses else "; effect unknown"
        problems = ", ".join(losses) or "no problems in the files"
        return f"{total} modules read, {problems}{effect} because {'; '.join(dict.fromkeys(reasons))}"
    trained = " as trained" if ledger.count("wrong") else ""
    verb = "take" if ledger.predicted else "took"
    start = f"{ledger.count('took effect')} of {total} modules {verb} effect{trained}"
    cut = [f"{ledger.cut} unknown: the trace was cut, and their records are not in it"] if ledger.cut else []
    return ", ".join([start, *(clause.with_code for clause in every), *cut])


@dataclass(frozen=True)
class Clause:
    """Rows that share fate, station, rule and field, as one sentence: `3 lost at stored: ...`. `names_modules`: the
    sentence begins with their names, because there are others."""

    text: str
    station: Station
    finding: Finding
    rows: tuple[Row, ...]
    names_modules: bool

    @property
    def with_code(self) -> str:
        return f"{self.text} ({self.finding.code})" if self.finding.code else self.text

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(row.module for row in self.rows)


def clauses(ledger: Ledger) -> list[Clause]:
    """The rows of a ledger that did not take effect, in groups."""
    groups: dict[tuple[Fate, Station, str, str | None], list[tuple[Row, Finding]]] = {}
    for row in ledger.rows:
        if row.decisive is not None:
            station, finding = row.decisive
            groups.setdefault((row.fate, station, finding.code, finding.field), []).append((row, finding))
    return [_clause(ledger, fate, station, members) for (fate, station, _, _), members in groups.items()]


def _clause(ledger: Ledger, fate: Fate, station: Station, members: Sequence[tuple[Row, Finding]]) -> Clause:
    """The clause of some modules, with their names unless they are all modules."""
    rows, findings = tuple(row for row, _ in members), [finding for _, finding in members]
    first, others = findings[0], len({finding.message for finding in findings}) - 1
    whole = len(rows) == len(ledger.rows)
    what = first.message if whole else _about(rows, first, ledger.names)
    where = f" at {station}" if fate != "unknown" or ledger.predicted else f" from {station} on"
    more = f" (and {others} more of this kind)" if others else ""
    return Clause(f"{len(rows)} {fate}{where}: {what}{more}", station, first, rows, not whole)


def _about(rows: Sequence[Row], finding: Finding, universe: Universe) -> str:
    names = name_modules([path_of(row.key) for row in rows], universe)
    if finding.predicate:
        return f"{names} {'is' if len(rows) == 1 else 'are'} {finding.message}"
    return f"{names}: {finding.message}"


def as_json(ledger: Ledger) -> dict[str, Any]:
    """The ledger as every command writes it with `--format json`."""
    return {
        "refused": ledger.refused,
        "message": ledger.message or None,
        "total": len(ledger.rows) + ledger.cut,
        "took_effect": ledger.count("took effect"),
        "wrong": ledger.count("wrong"),
        "lost": ledger.count("lost"),
        "unknown": ledger.count("unknown") + ledger.cut,
        "modules": [_row_as_json(row) for row in ledger.rows],
    }


def _row_as_json(row: Row) -> dict[str, Any]:
    module, parameter, expert = row.key
    return {
        "module": module,
        "parameter": parameter,
        "expert": expert,
        "stored_as": row.stored_as,
        "engine_as": row.engine_as,
        "expected_by": list(row.expected_by),
        "fate": row.fate,
        "stations": {station: finding.value for station, finding in row.stations.items()},
        "reason": row.decisive[1].code or None if row.decisive else None,
        "message": row.decisive[1].message if row.decisive else None,
    }
