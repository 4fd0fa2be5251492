"""A document as Markdown, to paste into an issue.

In: a `Document`. Out: Markdown in which nothing from a file is markup: the verdict, the findings, and tables. Of long
tables and heat maps the rows that matter are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_probe.render.cells import one_line
from lora_probe.render.document import Document, Finding, Heat, Lines, Section, Table, Timeline
from lora_probe.render.towers import Cell

MOST_ROWS = 20
"""Rows of a table; those in which something is wrong come first."""


def markdown(document: Document) -> str:
    """The whole document."""
    return "\n".join(_lines(document)).rstrip() + "\n"


def _lines(document: Document) -> Iterator[str]:
    yield from (f"## {plain(document.verdict)}", "", code(f"lora-probe {document.title}"), "")
    for finding in document.findings:
        yield from _finding(finding)
    for name, value in document.facts:
        yield f"- {plain(name)}: {code(value)}"
    for section in document.sections:
        if lines := list(_section(section)):
            yield from ("", f"### {plain(section.title)}", "", *lines)


def _finding(finding: Finding) -> Iterator[str]:
    yield from (f"**{finding.code} {plain(finding.name)}** ({finding.severity}): {plain(finding.message)}", "")
    yield from (f"- {plain(detail)}" for detail in finding.details)
    if finding.hint:
        yield f"- hint: {plain(finding.hint)}"
    yield ""


def _section(section: Section) -> Iterator[str]:
    """The lines of a section; none for pictures without numbers."""
    match section:
        case Table():
            yield from _table(section.headers, section.rows, section.bad)
        case Heat():
            yield from _heat(section)
        case Timeline():
            rows = [(step.at, step.stage, step.text, step.seconds) for step in section.steps]
            yield from _table(("at", "stage", "step", "took"), rows, frozenset())
        case Lines():
            yield from (f"- {plain(line)}" for line in section.lines)


def _heat(heat: Heat) -> Iterator[str]:
    """The first measure."""
    cells = heat.measures[0].cells
    rows = [(row, *map(_text, values)) for row, values in zip(heat.rows, cells, strict=True)]
    bad = frozenset(place for place, values in enumerate(cells) if any(cell and cell.bad for cell in values))
    yield from (f"{plain(heat.measures[0].name)}", "")
    yield from _table((heat.corner, *heat.columns), rows, bad)


def _text(cell: Cell | None) -> str:
    return "" if cell is None else cell.text


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], bad: frozenset[int]) -> Iterator[str]:
    shown = list(range(len(rows)))
    if len(rows) > MOST_ROWS:
        shown = sorted(sorted(shown, key=lambda number: number not in bad)[:MOST_ROWS])
    yield f"| {' | '.join(map(plain, headers))} |"
    yield "|---" * len(headers) + "|"
    for number in shown:
        yield f"| {' | '.join(map(plain, rows[number]))} |"
    if len(shown) < len(rows):
        yield from ("", f"{len(rows) - len(shown)} more rows")


def plain(text: str) -> str:
    """Text as text: no markup of its own, and nothing that ends a cell of a table. Code stays code."""
    text = one_line(text)
    parts = text.split("`")
    escaped = [part if number % 2 else _escaped(part) for number, part in enumerate(parts)]
    return "`".join(escaped) if len(parts) % 2 else _escaped(text.replace("`", "'"))


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in r"\*_[]<>|#" else letter for letter in text)


def code(text: str) -> str:
    """Text as code."""
    quiet = one_line(text).replace("`", "'").replace("|", "/")
    return f"`{quiet}`"
