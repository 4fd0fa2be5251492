"""`check` as text: the predicted ledgers of an adapter, the diagnostics, and the rules that were not run; of several
adapters a table, and with `--verbose` the diagnostics of each.

In: a `CheckResult`, whose pages are made here as well. Out: rich renderables. Everything from a file is on one line, so
that no name in a file can look like a line of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding

from lora_probe.checking import NotRun, Report
from lora_probe.errors import command_line
from lora_probe.ledger import Ledger, headline
from lora_probe.render.cells import SEVERITIES, SHOWN, assemble, one_line, words
from lora_probe.render.places import relative
from lora_probe.render.results import CheckResult, CheckRun, Paged
from lora_probe.render.tables import Facts, Fitted, add_row
from lora_probe.render.text.ledger import alike, stations
from lora_probe.render.verdicts import (
    counts,
    ignored,
    name_of,
    of_report,
    of_reports,
    plural,
    state,
    worst_first,
)
from lora_probe.rules import Diagnostic, all_rules
from lora_probe.rules.codes import in_ranges


def _page(report: Report, run: CheckRun) -> RenderableType | None:
    if run.adapters <= 1:
        return full_report(report)
    return _details(report) if run.verbose else None


def _whole(result: CheckResult) -> RenderableType:
    if not result.reports:
        return Group()
    if result.run.adapters <= 1:
        return Group(*result.pages)
    details = [*(_all_details(result) if result.run.verbose else ()), *_not_run(_together(result.reports))]
    line = of_reports(result.reports, len(result.not_judged)).line
    return Group(line, words(""), _rows(result), *([words(""), *details] if details else ()))


CHECK = Paged(_page, _whole)


def _all_details(result: CheckResult) -> Iterable[RenderableType]:
    """The pages of the adapters with findings. What was found in an earlier adapter as well is not repeated."""
    first: dict[tuple[tuple[str, str], ...], str] = {}
    for report, page in zip(result.reports, result.pages, strict=True):
        if page is None:
            continue
        name = name_of(report)
        earlier = first.setdefault(tuple((d.code, d.message) for d in report.diagnostics), name)
        if earlier != name:
            page = Group(words(name, style="bold"), words(f"  the same findings as in {earlier}"))
        yield from (page, words(""))


def full_report(report: Report) -> RenderableType:
    """One adapter in full."""
    parts: list[RenderableType] = [of_report(report).line, *_headlines(report)]
    parts += [*_tables(report), *([words("")] if report.ledgers else [])]
    return Group(*parts, *_findings(report), Facts(*facts_of(report)))


def facts_of(report: Report) -> list[tuple[str, str]]:
    """The adapter, its base, and for which vLLM its effect is predicted."""
    pairs = [("adapter", relative(report.adapter)), ("base model", report.model or "unknown")]
    if report.vllm and "vllm" not in report.not_served:
        pairs.append(("predicted for", f"vLLM {report.vllm}"))
    return pairs


def _details(report: Report) -> RenderableType | None:
    """One adapter of many, without hints. None if it has no diagnostics."""
    if not report.diagnostics:
        return None
    return Group(
        words(name_of(report), style="bold"), *_headlines(report, "  "), *_diagnostics(report.diagnostics, hints=False)
    )


def _rows(result: CheckResult) -> RenderableType:
    """A row for each adapter: its verdict, the number of findings, and the first of them. Paths are never broken: where
    they leave no room, the findings are in a line of their own."""
    rows = rows_of(result)
    styles = {"ok": "bold green", "unknown": "bold yellow", "unread": "bold red"} | SEVERITIES
    lines: list[RenderableType] = []
    for verdict, adapter, findings, cause in rows:
        first = assemble((f"{verdict}  ", styles[verdict]), adapter)
        first.no_wrap, first.overflow = True, "ignore"
        lines += [first, *([Padding(words(f"{findings}  {cause}".strip()), (0, 0, 0, 2))] if cause else [])]
    table = Fitted("verdict", "adapter", "findings", "first cause", narrow=Group(*lines))
    for verdict, *cells in rows:
        add_row(table, words(verdict, styles[verdict]), *cells)
    table.columns[1].min_width = max(len(adapter) for _, adapter, _, _ in rows)
    return table


def rows_of(result: CheckResult) -> list[tuple[str, str, str, str]]:
    """Verdict, adapter, findings and first cause of each adapter."""
    unread = (("unread", one_line(relative(lost.path)), "", "see the error below") for lost in result.not_judged)
    return [*map(row_of, result.reports), *unread]


def row_of(report: Report) -> tuple[str, str, str, str]:
    first = next(iter(worst_first(report.diagnostics)), None)
    verdict = state(report)
    causes = [f"{first.code} {first.name}"] if first is not None else []
    if verdict == "unknown":
        causes += dict.fromkeys(skipped.why for skipped in report.not_run if skipped.codes)
    findings = f"{counts(report.diagnostics)}{ignored(report.ignored)}".strip()
    return verdict, name_of(report), findings, "; ".join(causes)


def next_command(result: CheckResult, model: str | None) -> str:
    """The command to run next: the one that fixes the first adapter that can be fixed (unless that has just been done),
    else the page of the first error, or of several adapters the details of the first with an error."""
    rules = all_rules()
    base = ["--model", model] if model else []
    for report in result.reports if result.run.fixed is None else ():
        if any(rules[diagnostic.code].fixable for diagnostic in report.diagnostics):
            folder = relative(report.adapter)
            beside = folder if Path(folder).name not in ("", "..") else str(report.adapter.resolve())
            return command_line(["lora-probe", "check", folder, *base, "--fix", "-o", f"{beside}-fixed"])
    for report in result.reports:
        if not report.clean:
            if result.run.adapters > 1 and not result.run.verbose:
                return command_line(["lora-probe", "check", relative(report.adapter), *base])
            return f"lora-probe rule {next(d.code for d in report.diagnostics if d.severity == 'error')}"
    return ""


def _headlines(report: Report, indent: str = "") -> Iterable[RenderableType]:
    """The predicted headline of each engine. Engines with the same headline share a line; those that do not serve the
    model come first."""
    for engine, why in report.not_served.items():
        yield assemble(
            indent,
            (f"{engine}  ", "" if indent else "bold"),
            (f"not judged: {why}; --engine {engine} judges it", "bold yellow"),
        )
    same: dict[str, list[Ledger]] = {}
    for ledger in report.ledgers.values():
        same.setdefault(_headline(replace(ledger, engine="both"), report), []).append(ledger)
    for common, ledgers in same.items():
        engines = ", ".join(ledger.engine for ledger in ledgers)
        text = common if len(ledgers) > 1 else _headline(ledgers[0], report)
        yield assemble(indent, (f"{engines}  ", "" if indent else "bold"), (text, _style(ledgers[0])))


def _headline(ledger: Ledger, report: Report) -> str:
    """The headline; of a refusal without its reason, if a diagnostic states that below."""
    if ledger.refused and ledger.code in {diagnostic.code for diagnostic in report.diagnostics}:
        return f"refused by {ledger.engine} ({ledger.code})"
    return headline(ledger)


def _tables(report: Report) -> Iterable[RenderableType]:
    """The stations of an adapter that does not take full effect, a table for engines with the same stations."""
    same: dict[str, list[Ledger]] = {}
    for ledger in report.ledgers.values():
        if ledger.rows and not ledger.healthy and not ledger.refused:
            same.setdefault(repr(alike(ledger)), []).append(ledger)
    for ledgers in same.values():
        engines = ", ".join(ledger.engine for ledger in ledgers)
        yield stations(ledgers[0], "modules" if len(ledgers) == len(report.ledgers) else f"modules in {engines}")


def _style(ledger: Ledger) -> str:
    if ledger.healthy:
        return "bold green"
    return "bold red" if ledger.refused or ledger.count("lost") or ledger.count("wrong") else "bold yellow"


def _findings(report: Report) -> Iterable[RenderableType]:
    yield from _diagnostics(report.diagnostics)
    not_run = list(_not_run(report.not_run))
    yield from not_run
    if report.diagnostics or not_run:
        yield words("")


def _diagnostics(diagnostics: Sequence[Diagnostic], hints: bool = True) -> Iterable[RenderableType]:
    for diagnostic in worst_first(diagnostics):
        code = f"{diagnostic.severity} {diagnostic.code} {diagnostic.name}: "
        yield assemble((code, SEVERITIES[diagnostic.severity]), diagnostic.message)
        if about := _about(diagnostic):
            yield words(f"  {about}")
        if diagnostic.hint and hints:
            yield words(f"  hint: {diagnostic.hint}", "cyan")


def _about(diagnostic: Diagnostic) -> str:
    """The file, the engines and the modules."""
    where = ""
    if diagnostic.path:
        where = relative(diagnostic.path) + (f":{diagnostic.line}" if diagnostic.line is not None else "")
    return ", ".join(filter(None, [where, "/".join(diagnostic.engines), diagnostic.about]))


def _not_run(every: Iterable[NotRun]) -> Iterable[RenderableType]:
    skipped = [reason for reason in every if reason.codes]
    for reason in skipped[:SHOWN]:
        count = plural(len(reason.codes), "rule")
        yield words(f"not run because {reason.why}: {count} ({in_ranges(reason.codes)})", "yellow")
    if len(skipped) > SHOWN:
        yield words(f"not run for {len(skipped) - SHOWN} more reasons: see --format json", style="yellow")


def _together(reports: Sequence[Report]) -> list[NotRun]:
    """The rules that were not run for any of the adapters, each reason once."""
    adapters: Counter[NotRun] = Counter(reason for report in reports for reason in report.not_run)
    return [
        reason if count == len(reports) else NotRun(reason.codes, f"{reason.why} ({count} of {len(reports)} adapters)")
        for reason, count in adapters.items()
    ]
