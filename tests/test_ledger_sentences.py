"""The headline, word for word, where each of its conditions decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_trace_format import KEYS, process

from lora_probe import open_trace
from lora_probe.ledger import OK, STATIONS, Finding, Ledger, Row, as_json, headline
from lora_probe.recording import Load, ModuleRecord, TraceWriter

LOST = Finding("absent", "LP204", "not in the file", predicate=True)
WRONG = Finding("wrong", "LP201", "r=8 in the config")
UNKNOWN = Finding("unknown", message="no rows")


def row(name: str, last: Finding = OK, stations: int = 5) -> Row:
    """A module that is ok up to its last station."""
    names = STATIONS[:stations]
    return Row((f"model.layers.{name}", "weight", None), dict.fromkeys(names, OK) | {names[-1]: last})


def measured(*rows: Row) -> Ledger:
    return Ledger("vllm", rows)


def predicted(*rows: Row) -> Ledger:
    return Ledger("vllm", rows, predicted=True)


SENTENCES = [
    (measured(), "0 of 0 modules took effect"),
    (predicted(), "no modules in the files"),
    (measured(row("0.q")), "1 of 1 modules took effect"),
    (predicted(row("0.q", stations=3)), "1 of 1 modules take effect"),
    (
        measured(row("0.q", UNKNOWN, 4)),
        "0 of 1 modules took effect, 1 unknown from applied on: no rows",
    ),
    (predicted(row("0.q", UNKNOWN, 3)), "1 modules read, no problems in the files; effect unknown because no rows"),
    (
        predicted(row("0.q", UNKNOWN, 3), row("1.q", stations=3)),
        "1 of 2 modules take effect, 1 unknown at placed: layer 0 q: no rows",
    ),
    (
        predicted(row("0.q", LOST, 3), row("1.q", LOST, 3)),
        "0 of 2 modules take effect, 2 lost at placed: not in the file (LP204)",
    ),
    (
        predicted(row("0.q", UNKNOWN, 3), row("1.q", WRONG, 3), row("2.q", UNKNOWN, 3)),
        "3 modules read, 1 wrong at placed: layer 1 q: r=8 in the config (LP201); "
        "effect of the other 2 unknown because no rows",
    ),
    (measured(row("0.q", LOST)), "0 of 1 modules took effect, 1 lost at agrees: not in the file (LP204)"),
    (
        measured(row("0.q", LOST), row("1.q")),
        "1 of 2 modules took effect, 1 lost at agrees: layer 0 q is not in the file (LP204)",
    ),
    (
        measured(row("0.q", LOST), row("1.q", LOST), row("2.q")),
        "1 of 3 modules took effect, 2 lost at agrees: layers 0-1 q are not in the file (LP204)",
    ),
    (
        measured(row("0.q", WRONG), row("1.q")),
        "1 of 2 modules took effect as trained, 1 wrong at agrees: layer 0 q: r=8 in the config (LP201)",
    ),
    (
        measured(row("0.q", Finding("wrong", "LP604", "by 1")), row("1.q", Finding("wrong", "LP604", "by 2"))),
        "0 of 2 modules took effect as trained, 2 wrong at agrees: by 1 (and 1 more of this kind) (LP604)",
    ),
]


@pytest.mark.parametrize(("ledger", "sentence"), SENTENCES)
def test_the_headline(ledger: Ledger, sentence: str) -> None:
    assert headline(ledger) == sentence


def test_a_refused_ledger_is_not_healthy() -> None:
    """Not even if it holds modules of which nothing is wrong."""
    assert measured(row("0.q")).healthy
    assert not Ledger("vllm", (row("0.q"),), refused=True, message="no", code="LP402").healthy
    assert headline(Ledger("vllm", (), refused=True, message="no", code="LP402")) == "refused by vllm: no (LP402)"


@pytest.mark.parametrize("findings", [(WRONG, OK), (OK, WRONG), (WRONG, LOST), (LOST, OK), (OK, UNKNOWN, WRONG)])
def test_the_worst_that_a_station_has_shown_counts(findings: tuple[Finding, ...], tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process()) as writer:
        writer.record(Load(0, "a", "/a", "d"))
        writer.record(ModuleRecord(0, *KEYS[0], ["file"]))
        for finding in findings:
            writer.station(0, "placed", finding, [KEYS[0]])
    ((_, ledger),) = open_trace(tmp_path).loads
    values = [finding.value for finding in findings]
    worst = next(value for value in ("wrong", "absent", "ok", "unknown") if value in values)
    assert ledger.rows[0].stations["placed"].value == worst


def test_json_has_no_empty_texts() -> None:
    refused = as_json(Ledger("vllm", (), refused=True, message="no", code="LP402"))
    assert (refused["refused"], refused["message"]) == (True, "no")
    told = as_json(measured(row("0.q"), row("1.q", LOST), row("2.q", UNKNOWN)))
    assert told["message"] is None
    found = [(module["fate"], module["reason"], module["message"]) for module in told["modules"]]
    assert found == [("took effect", None, None), ("lost", "LP204", "not in the file"), ("took effect", None, None)]
    (unmeasured,) = as_json(measured(row("2.q", UNKNOWN, 4)))["modules"]
    assert (unmeasured["fate"], unmeasured["reason"], unmeasured["message"]) == ("unknown", None, "no rows")
