"""`rule` as text: one page, several, or a line per rule under the name of its family.

In: a `RuleList`. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from lora_probe.render.cells import assemble, paragraphs, words
from lora_probe.render.markdown import facts, families, first_sentence
from lora_probe.render.results import RuleList
from lora_probe.render.tables import add_row, columns_of
from lora_probe.rules import Rule, family_of

_LEAST = 20
"""The narrowest column for a sentence."""


def rules(result: RuleList) -> RenderableType:
    """The page of a single rule, or of every rule if pages are requested; else the list."""
    if result.pages or len(result.rules) == 1:
        parts = [part for rule in result.rules for part in (words(""), words(""), _page(rule))]
        return Group(*parts[2:])
    return _list(result.rules)


def _page(rule: Rule) -> RenderableType:
    head = assemble((f"{rule.code} {rule.name}", "bold"), f"  {facts(rule)}")
    return Group(head, words(""), paragraphs(rule.page), words(""), words(f"hint: {rule.hint}", style="cyan"))


def _list(rules: Sequence[Rule]) -> RenderableType:
    """A line per rule, by families. All families have the same columns."""
    widths = [max(len(text) for text in column) for column in zip(*map(_cells, rules), strict=True)]
    parts: list[RenderableType] = []
    for title, members in families(rules).items():
        table = columns_of("code", "name", "station", "severity", "reports")
        for column, width in zip(table.columns, (*widths, _LEAST), strict=True):
            column.min_width = width
        for rule in members:
            add_row(table, *_cells(rule), first_sentence(rule))
        by = family_of(members[0].code).commands
        parts += [assemble((title, "bold"), f"  (reported by {by})" if by else ""), table, words("")]
    return Group(*parts[:-1])


def _cells(rule: Rule) -> tuple[str, str, str, str]:
    return rule.code, rule.name, rule.station, rule.severity
