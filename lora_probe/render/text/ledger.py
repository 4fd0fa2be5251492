"""A ledger as text: its headline, and the modules by what happened to them. Used by `check`, `trace` and `show`.

In: a `Ledger`. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text as RichText

from lora_probe.ledger import STATIONS, Ledger, Station, headline
from lora_probe.names import name_modules, path_of
from lora_probe.render.cells import words
from lora_probe.render.tables import Fitted, add_row, columns_of
from lora_probe.rules import diagnose


def ledger_text(ledger: Ledger, prefix: str = "") -> RenderableType:
    """The headline, and the stations if a module is lost or wrong."""
    healthy = ledger.healthy
    first = words(prefix + headline(ledger), style="bold green" if healthy else "bold red")
    if healthy or ledger.refused:
        return Group(first, *_hints(ledger, with_message=True), *_not_measured(ledger))
    return Group(first, stations(ledger), *_hints(ledger))


def stations(ledger: Ledger, title: str = "modules") -> Fitted:
    """One row for the modules that have the same at every station, with the stations of this ledger as columns."""
    columns = [station for station in STATIONS if any(station in row.stations for row in ledger.rows)]
    table = columns_of(title, *columns, "fate")
    for values, modules in alike(ledger).items():
        label = f"{len(modules)}: {name_modules(modules, ledger.names)}"
        add_row(table, label, *(_cell(value) for value in values))
    return table


def alike(ledger: Ledger) -> dict[tuple[str, ...], list[str]]:
    """The modules that have the same at every station, by these values and the fate."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in ledger.rows:
        fate = "takes effect" if ledger.predicted and row.fate == "took effect" else row.fate
        values = (row.stations[station].value for station in STATIONS if station in row.stations)
        groups.setdefault((*values, fate), []).append(path_of(row.key))
    return groups


def _not_measured(ledger: Ledger) -> Iterable[RenderableType]:
    """Stations of healthy modules that were not measured, so that nobody takes silence for `ok`."""
    reasons: dict[tuple[Station, str], int] = {}
    for row in ledger.rows if ledger.healthy else ():
        for station in STATIONS:
            if row.stations[station].value == "unknown":
                reason = station, row.stations[station].message
                reasons[reason] = reasons.get(reason, 0) + 1
    for (station, message), count in reasons.items():
        yield words(f"  {station} was not measured for {count} of them: {message}", style="yellow")


def _cell(value: str) -> RichText:
    styles = dict.fromkeys(("wrong", "absent", "lost"), "bold red")
    styles |= dict.fromkeys(("ok", "took effect", "takes effect"), "green")
    return words(value, style=styles.get(value, "yellow"))


def _hints(ledger: Ledger, with_message: bool = False) -> Iterable[RenderableType]:
    for diagnostic in diagnose(ledger):
        # The headline has the messages of the others.
        of_load = not diagnostic.modules and diagnostic.severity == "warning"
        if of_load or (with_message and diagnostic.modules):
            yield words(f"  {diagnostic.message}")
        yield words(f"  {diagnostic.code} {diagnostic.name}: {diagnostic.hint}", style="cyan")
