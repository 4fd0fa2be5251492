"""Parts that documents share: findings of rules, ledgers, and tables that the terminal has, too.

In: diagnostics, ledgers, rich tables. Out: findings and sections of a `Document`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text as RichText

from lora_probe.ledger import STATIONS, Ledger, Row
from lora_probe.names import Key
from lora_probe.render.document import Finding, Heat, Lines, Table, heats
from lora_probe.render.places import relative
from lora_probe.render.tables import Fitted
from lora_probe.render.text.ledger import alike, stations
from lora_probe.render.towers import Cell
from lora_probe.rules import Diagnostic, all_rules


def finding_of(diagnostic: Diagnostic) -> Finding:
    """A diagnostic with its file, engines and modules."""
    where = ""
    if diagnostic.path:
        where = relative(diagnostic.path) + (f":{diagnostic.line}" if diagnostic.line is not None else "")
    details = tuple(filter(None, (where, ", ".join(diagnostic.engines), diagnostic.about)))
    words = diagnostic.code, diagnostic.name, diagnostic.severity, diagnostic.message, diagnostic.hint
    return Finding(*words, details, page_of(diagnostic.code))


def page_of(code: str) -> str:
    """The page of a rule; empty for a rule of another distribution that is gone."""
    rule = all_rules().get(code)
    return rule.page if rule is not None else ""


def table_of(title: str, table: Fitted, about: str = "") -> Table:
    """A table of the terminal."""
    headers = tuple(_plain(column.header) for column in table.columns)
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    return Table(title, headers, tuple(zip(*columns, strict=True)), about=about)


def lines_of(title: str, lines: Iterable[RichText]) -> list[Lines]:
    """Lines of the terminal; no section if there are none."""
    texts = tuple(line.plain for line in lines)
    return [Lines(title, texts)] if texts else []


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, RichText) else str(cell)


def ledger_sections(ledger: Ledger, title: str) -> Iterator[Table | Heat]:
    """The stations of modules that have the same, and the fate of each module."""
    if not ledger.rows:
        return
    groups = list(alike(ledger))
    bad = frozenset(number for number, values in enumerate(groups) if values[-1] in ("lost", "wrong"))
    table = table_of(title, stations(ledger))
    yield Table(table.title, table.headers, table.rows, bad, "What became of the modules at each station.")


def fate_cells(ledgers: Sequence[tuple[str, Ledger]]) -> dict[str, dict[Key, Cell]]:
    """What became of each module in each engine."""
    return {f"fate in {name}": {row.key: _fate(row, ledger) for row in ledger.rows} for name, ledger in ledgers}


def _fate(row: Row, ledger: Ledger) -> Cell:
    bad = row.fate in ("lost", "wrong")
    station = next((name for name in STATIONS if name in row.stations and row.stations[name].value != "ok"), "")
    fate = "takes effect" if ledger.predicted and row.fate == "took effect" else row.fate
    return Cell(f"{fate} at {station}" if bad and station else fate, bad=bad)


def fate_heats(ledgers: Sequence[tuple[str, Ledger]]) -> list[Heat]:
    """A heat map of the fates, if a module has no effect somewhere."""
    told = [(name, ledger) for name, ledger in ledgers if ledger.rows and not ledger.healthy]
    return heats("Fate of each module", fate_cells(told)) if told else []
