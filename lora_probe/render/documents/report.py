"""The document of `check`: the predicted ledgers of an adapter and what rules found; of several adapters a row each.

In: a `Report`, and the documents of several. Out: a `Document`.
"""

from __future__ import annotations

from lora_probe.checking import Report
from lora_probe.errors import command_line
from lora_probe.ledger import headline
from lora_probe.render.cells import one_line
from lora_probe.render.document import Document, Lines, Section, Table
from lora_probe.render.documents.parts import fate_heats, finding_of, ledger_sections
from lora_probe.render.places import relative
from lora_probe.render.results import CheckResult, CheckRun, Paged
from lora_probe.render.text.check import facts_of, rows_of
from lora_probe.render.verdicts import name_of, of_check, of_report, worst_first


def report(result: Report) -> Document:
    """One adapter in full."""
    verdict = of_report(result)
    ledgers = list(result.ledgers.items())
    sections: list[Section] = []
    if lines := [*(f"{engine}: not judged: {why}" for engine, why in result.not_served.items())]:
        sections.append(Lines("Engines that do not serve the model", tuple(lines)))
    if ledgers:
        rows = tuple((engine, headline(ledger)) for engine, ledger in ledgers)
        bad = frozenset(number for number, (_, ledger) in enumerate(ledgers) if not ledger.healthy)
        sections.append(Table("Predicted effect", ("engine", "modules"), rows, bad))
    sections += fate_heats(ledgers)
    for engine, ledger in ledgers:
        sections += ledger_sections(ledger, f"Stations in {engine}")
    if skipped := [reason for reason in result.not_run if reason.codes]:
        told = tuple((reason.why, ", ".join(reason.codes)) for reason in skipped)
        sections.append(Table("Rules that were not run", ("because", "rules"), told))
    if result.notes:
        sections.append(Lines("Notes", result.notes))
    findings = tuple(map(finding_of, worst_first(result.diagnostics)))
    title = command_line(["check", name_of(result)])
    return Document(title, verdict.text, verdict.tone, findings, tuple(facts_of(result)), tuple(sections))


def _page(result: Report, run: CheckRun) -> Document:
    return report(result)


def reports(result: CheckResult) -> Document:
    """The document of one adapter, or that of all with a row for each."""
    pages = list(result.pages)
    if len(pages) == 1 and not result.not_judged:
        page: Document = pages[0]
        return page
    verdict = of_check(result)
    unread = [
        Document(command_line(["check", one_line(relative(lost.path))]), lost.error.message, "open")
        for lost in result.not_judged
    ]
    told = {row[1]: document.verdict for row, document in zip(rows_of(result)[len(pages) :], unread, strict=True)}
    rows = tuple((*row[:3], told.get(row[1], row[3])) for row in rows_of(result))
    bad = frozenset(number for number, row in enumerate(rows) if row[0] in ("error", "unread"))
    table = Table("Adapters", ("verdict", "adapter", "findings", "first cause"), rows, bad)
    findings = tuple(finding for page in pages for finding in page.findings)
    return Document("check", verdict.text, verdict.tone, findings, (), (table,), (*pages, *unread))


CHECK = Paged(_page, reports)
