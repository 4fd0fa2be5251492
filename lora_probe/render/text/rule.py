"""What a person sees of `rule`: one page, several, or a line for each rule under the name of its family.

In: rules. Out: tables and sentences, as in `terminal.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from lora_probe.render.cells import add_row, assemble, columns_of, paragraphs, words
from lora_probe.render.markdown import facts, families
from lora_probe.rules import Rule
from lora_probe.rules.codes import family_of

COMMANDS = {
    "LP1": "check",
    "LP2": "check, and trace for what it measures",
    "LP3": "check, and trace for what it measures",
    "LP4": "check, and trace for a refusal",
    "LP5": "trace",
    "LP6": "trace",
    "LP7": "parity",
}
"""Which commands give the rules of a family, by the beginning of its codes."""


def rule(found: Rule) -> RenderableType:
    """The page of a rule."""
    head = assemble((f"{found.code} {found.name}", "bold"), f"  {facts(found)}")
    return Group(head, words(""), paragraphs(found.page), words(""), words(f"hint: {found.hint}", style="cyan"))


def pages(found: Sequence[Rule]) -> RenderableType:
    """The pages of several rules, one after another."""
    parts = [part for one in found for part in (words(""), words(""), rule(one))]
    return Group(*parts[2:])


def rules(found: Sequence[Rule]) -> RenderableType:
    """All rules, a line each, by families; the columns are the same in all."""
    widths = [max(len(text) for text in column) for column in zip(*map(_facts, found), strict=True)]
    parts: list[RenderableType] = []
    for title, members in families(found).items():
        table = columns_of("code", "name", "station", "severity", "says")
        for column, width in zip(table.columns, widths, strict=False):
            column.min_width = width
        for one in members:
            add_row(table, *_facts(one), one.page.partition("\n")[0])
        by = COMMANDS.get(family_of(members[0].code))
        parts += [assemble((title, "bold"), f"  (from {by})" if by else ""), table, words("")]
    return Group(*parts[:-1])


def _facts(found: Rule) -> tuple[str, str, str, str]:
    return found.code, found.name, found.station, found.severity
