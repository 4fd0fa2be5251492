"""What a person sees of `check`: for each adapter what the engines will make of it, what was found, what was not run.

In: a `Report`, or many. Out: tables and sentences, as in `terminal.py`. Everything that is found stands in one line, so
that nothing in a file's names looks like a line of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from lora_probe.checking import NotRun, Report
from lora_probe.ledger import Ledger, headline, name_modules
from lora_probe.render import terminal
from lora_probe.render.cells import add_row, assemble, one_line, words
from lora_probe.render.places import relative
from lora_probe.rules import Diagnostic, Severity

FULL = 3
"""Up to this many adapters are shown in full; of more, each gets a line, and those with findings their details."""
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}
ORDER: tuple[Severity, ...] = ("error", "warning", "info")
WIDEST = 60
"""Columns for the adapters' paths, where there are many."""


def report(found: Report) -> RenderableType:
    """One adapter in full."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    add_row(facts, "adapter", one_line(relative(found.adapter)))
    add_row(facts, "base model", one_line(found.model or "not known"))
    parts: list[RenderableType] = [facts, *(_text(f"note: {note}", "cyan") for note in found.notes), words("")]
    for engine, ledger in found.ledgers.items():
        parts.append(assemble((f"{engine}  ", "bold"), (one_line(headline(ledger)), _style(ledger))))
    parts += [*_tables(found), *([words("")] if found.ledgers else [])]
    return Group(*parts, *_findings(found), _verdict(found))


def full(reports: Sequence[RenderableType], found: Sequence[Report], lost: int) -> RenderableType:
    """A few adapters, each as `report` shows it."""
    if len(found) == 1:
        return Group(*reports)
    return Group(*(part for one in reports for part in (one, words(""))), summary(found, lost))


def compact(details: Sequence[RenderableType | None], found: Sequence[Report], lost: int) -> RenderableType:
    """Many adapters: a line each, then the `details` of those that have any."""
    parts = [part for one in details if one is not None for part in (one, words(""))]
    return Group(lines(found), words(""), *parts, summary(found, lost))


def lines(found: Sequence[Report]) -> RenderableType:
    """A line for each adapter: how it is, how much was found, and the first of it."""
    width = min(max(len(_name(report)) for report in found), WIDEST)
    return Group(*(_summary_line(report, width) for report in found))


def details(found: Report) -> RenderableType | None:
    """One adapter of many: what was found of it, without the hints; None where that is nothing."""
    if not found.diagnostics:
        return None
    parts: list[RenderableType] = [words(_name(found), style="bold")]
    for engine, ledger in found.ledgers.items():
        parts.append(assemble(f"  {engine}  ", (one_line(headline(ledger)), _style(ledger))))
    return Group(*parts, *_diagnostics(found.diagnostics, hints=False))


def summary(found: Sequence[Report], lost: int = 0) -> RenderableType:
    """All adapters in one line, after the rules that could not be run."""
    bad = sum(not report.clean for report in found)
    good = sum(not report.diagnostics for report in found)
    parts = [_plural(len(found), "adapter") + f": {good} without a finding, {bad} with errors"]
    if lost:
        parts.append(f"{lost} not judged")
    counts = _counts([diagnostic for report in found for diagnostic in report.diagnostics])
    style = "bold red" if bad or lost else "bold green" if good == len(found) else "bold yellow"
    sentence = "; ".join(filter(None, [", ".join(parts), counts]))
    return Group(*_not_run(_together(found)), words(sentence, style))


def _summary_line(found: Report, width: int) -> RichText:
    first = next(iter(_by_gravity(found.diagnostics)), None)
    word = "ok" if first is None else first.severity
    style = "bold green" if first is None else STYLES[first.severity]
    parts: list[str | tuple[str, str]] = [(f"{word:7}  ", style), f"{_name(found):{width}}"]
    if first is not None:
        parts.append(f"  {_counts(found.diagnostics)}: {first.code} {first.name}")
    return assemble(*parts)


def _name(found: Report) -> str:
    return one_line(relative(found.adapter))


def _tables(found: Report) -> Iterable[RenderableType]:
    """The modules that do not take effect, by engine; engines that do the same with them share a table."""
    alike: dict[str, list[Ledger]] = {}
    for ledger in found.ledgers.values():
        if ledger.rows and not ledger.healthy and not ledger.refused:
            alike.setdefault(headline(ledger), []).append(ledger)
    for ledgers in alike.values():
        engines = ", ".join(ledger.engine for ledger in ledgers)
        yield terminal.stations(
            ledgers[0], "modules" if len(ledgers) == len(found.ledgers) else f"modules in {engines}"
        )


def _style(ledger: Ledger) -> str:
    if ledger.healthy:
        return "bold green"
    return "bold red" if ledger.refused or ledger.count("lost") or ledger.count("wrong") else "bold yellow"


def _findings(found: Report) -> Iterable[RenderableType]:
    yield from _diagnostics(found.diagnostics)
    not_run = list(_not_run(found.not_run))
    yield from not_run
    if found.diagnostics or not_run:
        yield words("")


def _diagnostics(found: Sequence[Diagnostic], hints: bool = True) -> Iterable[RenderableType]:
    for diagnostic in _by_gravity(found):
        code = f"{diagnostic.severity} {diagnostic.code} {diagnostic.name}: "
        yield assemble((code, STYLES[diagnostic.severity]), one_line(diagnostic.message))
        if about := _about(diagnostic):
            yield _text(f"  {about}")
        if diagnostic.hint and hints:
            yield _text(f"  hint: {diagnostic.hint}", "cyan")


def _about(diagnostic: Diagnostic) -> str:
    """Which modules, in which engines, in which file."""
    modules = name_modules(diagnostic.modules) if diagnostic.modules else ""
    if modules and modules in diagnostic.message:
        modules = ""
    where = ""
    if diagnostic.path:
        where = relative(diagnostic.path) + (f":{diagnostic.line}" if diagnostic.line is not None else "")
    return ", ".join(filter(None, [where, "/".join(diagnostic.engines), modules]))


def _by_gravity(found: Sequence[Diagnostic]) -> list[Diagnostic]:
    return sorted(found, key=lambda diagnostic: ORDER.index(diagnostic.severity))


def _not_run(every: Iterable[NotRun]) -> Iterable[RenderableType]:
    found = [one for one in every if one.codes]
    for one in found[: terminal.SHOWN]:
        yield _text(f"not run: {', '.join(one.codes)}: {one.why}", "yellow")
    if len(found) > terminal.SHOWN:
        yield words(f"not run, for {len(found) - terminal.SHOWN} more reasons: see --format json", style="yellow")


def _together(found: Sequence[Report]) -> list[NotRun]:
    """The rules that were not run for any of the adapters, each reason once."""
    adapters: Counter[NotRun] = Counter(one for report in found for one in report.not_run)
    return [
        one if count == len(found) else NotRun(one.codes, f"{one.why} ({count} of {len(found)} adapters)")
        for one, count in adapters.items()
    ]


def _verdict(found: Report) -> RenderableType:
    where = _name(found).rstrip("/") + "/"
    if not found.diagnostics:
        return words(f"no finding in {where}", style="bold green")
    return words(f"{_counts(found.diagnostics)} in {where}", style=STYLES[_by_gravity(found.diagnostics)[0].severity])


def _counts(found: Iterable[Diagnostic]) -> str:
    """`2 errors, 1 warning`."""
    counts = Counter(diagnostic.severity for diagnostic in found)
    said = {one: f"{counts[one]} {one}" if one == "info" else _plural(counts[one], one) for one in ORDER}
    return ", ".join(said[severity] for severity in ORDER if counts[severity])


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _text(content: str, style: str = "") -> RichText:
    return words(one_line(content), style=style)
