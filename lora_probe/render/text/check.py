"""What a person sees of `check`: for each adapter what the engines will make of it, what was found, what was not run.

In: a `Report`, or many. Out: tables and sentences, as in `terminal.py`. Everything that is found stands in one line, so
that nothing in a file's names looks like a line of ours.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from lora_probe.checking import NotRun, Report
from lora_probe.ledger import Ledger, headline
from lora_probe.names import name_modules
from lora_probe.render.cells import add_row, assemble, one_line, words
from lora_probe.render.places import relative
from lora_probe.render.text import terminal
from lora_probe.rules import Diagnostic, Severity

FULL = 3
"""Up to this many adapters are shown in full; of more, each gets a line, and those with findings their details."""
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}
ORDER: tuple[Severity, ...] = ("error", "warning", "info")
WIDEST = 60
"""Columns for the adapters' paths, where there are many."""
MENDED = frozenset(("LP213", "LP214", "LP215", "LP219", "LP302"))
"""What `--fix` mends."""


def report(found: Report) -> RenderableType:
    """One adapter in full."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    add_row(facts, "adapter", relative(found.adapter))
    add_row(facts, "base model", found.model or "not known")
    if found.vllm:
        add_row(facts, "predicted for", f"vLLM {found.vllm}")
    parts: list[RenderableType] = [facts, *(words(f"note: {note}", "cyan") for note in found.notes), words("")]
    parts += [*_headlines(found), *_tables(found), *([words("")] if found.ledgers else [])]
    return Group(*parts, *_findings(found), _verdict(found))


def full(reports: Sequence[RenderableType], found: Sequence[Report], lost: int) -> RenderableType:
    """A few adapters, each as `report` shows it."""
    if len(found) == 1:
        return Group(*reports)
    return Group(*(part for one in reports for part in (one, words(""))), summary(found, lost))


def compact(details: Sequence[RenderableType | None], found: Sequence[Report], lost: int) -> RenderableType:
    """Many adapters: a line each, then the `details` of those that have any."""
    parts = [part for one in details if one is not None for part in (one, words(""))]
    return Group(lines(found), words(""), *parts, *_not_run(_together(found)), summary(found, lost))


def lines(found: Sequence[Report]) -> RenderableType:
    """A line for each adapter: how it is, how much was found, and the first of it."""
    width = min(max(len(_name(report)) for report in found), WIDEST)
    return Group(*(_summary_line(report, width) for report in found))


def details(found: Report) -> RenderableType | None:
    """One adapter of many: what was found of it, without the hints; None where that is nothing."""
    if not found.diagnostics:
        return None
    return Group(
        words(_name(found), style="bold"), *_headlines(found, "  "), *_diagnostics(found.diagnostics, hints=False)
    )


def summary(found: Sequence[Report], lost: int = 0) -> RenderableType:
    """All adapters in one line, each counted once."""
    kinds = Counter(map(_kind, found))
    said = {"ok": "without a finding", "unknown": "not fully judged", "info": "with infos", "warning": "with warnings"}
    said |= {"error": "with errors"}
    parts = [f"{kinds[kind]} {what}" for kind, what in said.items() if kinds[kind]]
    parts += [f"{lost} not judged"] if lost else []
    counts = _counts([diagnostic for report in found for diagnostic in report.diagnostics])
    ignored = sum(report.ignored for report in found)
    style = "bold red" if kinds["error"] or lost else "bold green" if kinds["ok"] == len(found) else "bold yellow"
    sentence = f"{_plural(len(found), 'adapter')}: {', '.join(parts)}{counts and '; '}{counts}{_ignored(ignored)}"
    return words(sentence, style)


def next_command(found: Sequence[Report], model: str | None, mended: bool) -> str:
    """What to do about the findings: the command that mends the first that can be, else the page of the first error.
    `mended`: that has been done already."""
    for report in found if not mended else ():
        if any(one.code in MENDED for one in report.diagnostics):
            folder = relative(report.adapter)
            beside = folder if Path(folder).name not in ("", "..") else str(report.adapter.resolve())
            base = ["--model", model] if model else []
            return shlex.join(["lora-probe", "check", folder, *base, "--fix", "-o", f"{beside}-fixed"])
    codes = [one.code for report in found for one in report.diagnostics if one.severity == "error"]
    return f"lora-probe rule {codes[0]}" if codes else ""


def _kind(found: Report) -> str:
    """The one word for an adapter: its worst finding; if that is no error, whether some rule was not run."""
    first = next(iter(_by_gravity(found.diagnostics)), None)
    if first is not None and first.severity == "error":
        return "error"
    if _rules_not_run(found):
        return "unknown"
    return "ok" if first is None else first.severity


def _rules_not_run(found: Report) -> int:
    return len({code for one in found.not_run for code in one.codes})


def _summary_line(found: Report, width: int) -> RichText:
    first = next(iter(_by_gravity(found.diagnostics)), None)
    kind = _kind(found)
    style = {"ok": "bold green", "unknown": "bold yellow"}.get(kind) or STYLES[first.severity if first else "info"]
    said = [f"{_counts(found.diagnostics)}: {first.code} {first.name}"] if first is not None else []
    if kind == "unknown":
        said.append(f"({'; '.join(dict.fromkeys(one.why for one in found.not_run if one.codes))})")
    said += [_ignored(found.ignored).strip()] if found.ignored else []
    return assemble((f"{kind:7}  ", style), f"{_name(found):{width}}", *(f"  {one}" for one in said))


def _name(found: Report) -> str:
    return one_line(relative(found.adapter))


def _headlines(found: Report, indent: str = "") -> Iterable[RenderableType]:
    """What each engine will make of it; where they make the same of it, in one line."""
    same: dict[str, list[Ledger]] = {}
    for ledger in found.ledgers.values():
        same.setdefault(headline(replace(ledger, engine="both")), []).append(ledger)
    for sentence, ledgers in same.items():
        engines = ", ".join(ledger.engine for ledger in ledgers)
        said = sentence if len(ledgers) > 1 else headline(ledgers[0])
        yield assemble(indent, (f"{engines}  ", "" if indent else "bold"), (said, _style(ledgers[0])))


def _tables(found: Report) -> Iterable[RenderableType]:
    """The modules that do not take effect, by engine; engines that do the same with them share a table."""
    same: dict[str, list[Ledger]] = {}
    for ledger in found.ledgers.values():
        if ledger.rows and not ledger.healthy and not ledger.refused:
            same.setdefault(repr(terminal.alike(ledger)), []).append(ledger)
    for ledgers in same.values():
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
        yield assemble((code, STYLES[diagnostic.severity]), diagnostic.message)
        if about := _about(diagnostic):
            yield words(f"  {about}")
        if diagnostic.hint and hints:
            yield words(f"  hint: {diagnostic.hint}", "cyan")


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
        yield words(f"not run: {', '.join(one.codes)}: {one.why}", "yellow")
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
    where = f"in {_name(found).rstrip('/')}/{_ignored(found.ignored)}"
    count = _rules_not_run(found)
    if count:
        where += f"; {_plural(count, 'rule')} {'was' if count == 1 else 'were'} not run"
    if not found.diagnostics:
        return words(f"no finding {where}", style="bold yellow" if count else "bold green")
    return words(f"{_counts(found.diagnostics)} {where}", style=STYLES[_by_gravity(found.diagnostics)[0].severity])


def _ignored(count: int) -> str:
    """Findings that were there, and not to be said."""
    return f" ({count} ignored)" if count else ""


def _counts(found: Iterable[Diagnostic]) -> str:
    """`2 errors, 1 warning`."""
    counts = Counter(diagnostic.severity for diagnostic in found)
    said = {one: f"{counts[one]} {one}" if one == "info" else _plural(counts[one], one) for one in ORDER}
    return ", ".join(said[severity] for severity in ORDER if counts[severity])


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
