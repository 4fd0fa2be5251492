"""The section of one adapter in a recording as text. Used by `trace` and `show`.

In: a `Recording`, an adapter with its loads, and the totals of their rows. Out: rich renderables: the headline of the
newest load, what it lost, its own contributions, and a line for each earlier load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import RenderableType

from lora_probe.comparison.recorded import AdapterLoads, LoadEntry
from lora_probe.comparison.totals import Totals, own_contributions
from lora_probe.names import Key, name_modules, path_of
from lora_probe.recording import REPLICA_LOADS
from lora_probe.render.cells import SHOWN, words
from lora_probe.render.results import Recording
from lora_probe.render.tables import Grid
from lora_probe.render.text.ledger import ledger_text
from lora_probe.render.towers import Cell
from lora_probe.rules.diagnostics import of_requests

CONTRIBUTION = "contribution ‖s·x·A·B‖ / ‖base output‖"


def alone(result: Recording, entry: LoadEntry, measured: Totals | None) -> Iterator[RenderableType]:
    """The only load of a run."""
    yield _state(entry, "")
    yield from _of_requests(result, entry)
    yield from _log_lines(result.trace.engine, entry.load.said, entry)
    yield from _contributions(entry, measured, "all rows of the adapter", words(""))


def section(result: Recording, adapter: AdapterLoads, measured: Totals | None) -> Iterator[RenderableType]:
    """One adapter: its newest load in full, unless nothing used it, and the earlier ones in one line each. If requests
    are shown, only what the newest load lost."""
    entry = adapter.newest
    yield _state(entry, f"{adapter.name} (load {entry.number}): ")
    yield from _of_requests(result, entry)
    if result.requests:
        return
    if entry.used or not entry.sound:
        yield words(f"  {', '.join(_facts(entry, measured))}", style="dim")
        yield words(f"  from {entry.load.path}, content {_digest(entry.load.digest)}", style="dim")
    if entry.graphs is not None:
        yield words(f"  {entry.graphs.text}", style="bold red" if entry.graphs.facts.get("wrong") else "")
    yield from _log_lines(result.trace.engine, entry.load.said, entry)
    yield from _contributions(entry, measured, f"the rows of load {entry.number}")
    yield from _earlier(adapter.others, entry, None if result.everything else SHOWN)


def _state(entry: LoadEntry, prefix: str) -> RenderableType:
    if entry.outcome is not None:
        style = "bold green" if entry.sound else "bold red" if entry.outcome.code else "bold yellow"
        return words(prefix + entry.headline, style=style)
    if entry.sound and not entry.ledger.healthy:
        return words(prefix + entry.headline, style="bold yellow")
    return ledger_text(entry.ledger, prefix)


def _of_requests(result: Recording, entry: LoadEntry) -> Iterator[RenderableType]:
    """What went wrong for requests while the load was active; and how to cure what a server's answers show."""
    if entry.outcome is not None and entry.outcome.code:
        diagnostic = of_requests(entry.outcome.code, entry.outcome.message, result.trace.engine)
        yield words(f"  {diagnostic.code} {diagnostic.name}: {diagnostic.hint}", style="cyan")
    for finding in entry.findings:
        diagnostic = of_requests(finding.code, finding.message, result.trace.engine)
        yield words(diagnostic.message, style="bold red")
        yield words(f"  {diagnostic.code} {diagnostic.name}: {diagnostic.hint}", style="cyan")


def _facts(entry: LoadEntry, measured: Totals | None) -> Iterator[str]:
    load = entry.load
    if entry.at is not None:
        yield f"loaded at {entry.at:.3f} s"
    if load.engine_id is not None:
        yield f"id {load.engine_id}"
    yield f"generation {load.generation}"
    yield "no slot" if load.slot is None else f"slot {load.slot}"
    if measured is not None and (count := measured.rows.get(entry.number)):
        requests = sum(entry.number in request.loads for request in measured.requests)
        yield f"{count:,} rows of {requests:,} {'request' if requests == 1 else 'requests'}"


def _digest(digest: str) -> str:
    """The beginning and the end of a content hash: one is of the config, the other of the weights."""
    return digest if len(digest) <= 2 * SHOWN else f"{digest[:8]}...{digest[-8:]}"


def _earlier(entries: Sequence[LoadEntry], newest: LoadEntry, most: int | None) -> Iterator[RenderableType]:
    """A line for each other load, the newest first."""
    shown = entries[::-1][:most]
    for entry in shown:
        when = "" if entry.at is None else f"at {entry.at:.3f} s, "
        content = "the same content" if entry.load.digest == newest.load.digest else _digest(entry.load.digest)
        engine = entry.number // REPLICA_LOADS
        name = f"load {entry.number}" + (f" of engine {engine}" if engine else "")
        text = f"  {name}: {when}generation {entry.load.generation}, {content}: {_in_short(entry)}"
        yield words(text, style="" if entry.sound and not entry.findings else "bold red")
    if len(shown) < len(entries):
        yield words(f"  ... and {len(entries) - len(shown):,} other loads; --all prints all of them")


def _in_short(entry: LoadEntry) -> str:
    """The ledger of an earlier load in a few words."""
    ledger = entry.ledger
    if ledger.refused:
        return f"refused by {ledger.engine}"
    if not entry.used and entry.sound:
        return "no request used it"
    counts = [f"{finding.code} {finding.message}" for finding in entry.findings]
    counts += [f"{count} {fate}" for fate in ("lost", "wrong", "unknown") if (count := ledger.count(fate))]
    return ", ".join([f"{ledger.count('took effect')} of {len(ledger.rows)} modules took effect", *counts])


def _contributions(
    entry: LoadEntry, measured: Totals | None, rows: str, *before: RenderableType
) -> Iterator[RenderableType]:
    """The table of one load, and the modules that are judged and have no rows: experts."""
    if cells := contributions(entry, measured):
        yield from before
        yield Grid(f"{CONTRIBUTION}, over {rows}", cells)
    without = [row.key for row in entry.ledger.rows if row.fate == "took effect" and row.key not in cells]
    if without and measured is not None:
        names = name_modules(map(path_of, without), entry.ledger.names)
        yield words(f"without contributions in the trace: {names}", style="dim")


def contributions(entry: LoadEntry, measured: Totals | None) -> dict[Key, Cell]:
    """The contributions of one load by module. Its own fate decides what a cell states."""
    if measured is None or entry.number not in measured.contributions:
        return {}
    fates = {row.key: row.fate for row in entry.ledger.rows}
    cells = {key: Cell(fate, bad=True) for key, fate in fates.items() if fate in ("lost", "wrong")}
    for contribution in own_contributions(entry.ledger, measured.contributions[entry.number]):
        fate, strength = fates[contribution.key], contribution.strength
        if contribution.rows and fate != "lost":
            mark = " wrong" if fate == "wrong" else ""
            text = ("-" if strength is None else f"{strength:.3g}") + mark
            cells[contribution.key] = Cell(text, strength, strength is None or bool(mark))
    return cells


def _log_lines(engine: str, lines: Sequence[str], entry: LoadEntry) -> Iterable[RenderableType]:
    """What the engine logged while it loaded an adapter that did not take effect."""
    if entry.sound or entry.ledger.refused or entry.outcome is not None:
        return
    if not lines:
        yield words(f"{engine} reported no log lines at INFO or above while it loaded the adapter")
    for line in lines[:SHOWN]:
        yield words(f"{engine} log: {line}")
