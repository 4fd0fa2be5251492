"""`inspect A B` as text: two adapters side by side.

In: an `AdapterDiff`. Out: rich renderables: the verdict, the fields that differ, and the modules that do.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Group, RenderableType

from lora_probe.adapter.side_by_side import AdapterDiff, ModulePair
from lora_probe.names import Key, name_modules, path_of
from lora_probe.render.cells import words
from lora_probe.render.console import detail
from lora_probe.render.tables import Facts, Fitted, Grid, add_row, columns_of, named_rows
from lora_probe.render.towers import Cell
from lora_probe.render.verdicts import of_diff

DISTANCE = "‖ΔW₂ - ΔW₁‖ / ‖ΔW₁‖ (0: equal)"
LISTED = 12
"""Modules that are listed without `--verbose`."""
COLUMNS = ("module", "how", "cosine", "factor", "distance", "rows of A", "columns of B")
"""The distance is ‖ΔW₂ - ΔW₁‖ / ‖ΔW₁‖; rows and columns are the shares that both have."""


def side_by_side(diff: AdapterDiff) -> RenderableType:
    """The verdict first."""
    parts: list[RenderableType] = [of_diff(diff).line, words("")]
    if diff.fields:
        parts += [fields(diff), words("")]
    if changed := [pair for pair in diff.modules if not pair.alike]:
        parts += [Grid(DISTANCE, distances(diff)), words("")]
        shown = changed if detail() == "verbose" else sorted(changed, key=closeness)[:LISTED]
        parts.append(modules(shown))
        if len(shown) < len(changed):
            parts.append(words(f"{len(changed) - len(shown)} more modules that differ: -v", style="dim"))
        parts.append(words(""))
    return Group(*parts, Facts(("first", diff.first.path), ("second", diff.second.path)))


def closeness(pair: ModulePair) -> float:
    """A sort key: what could not be compared comes first, then what is the furthest apart."""
    return -float("inf") if pair.share is None else -pair.share


def fields(diff: AdapterDiff) -> Fitted:
    """The fields of the configs that differ."""
    table = columns_of("field", "first", "second")
    for name, one, two in diff.fields:
        add_row(table, name, value(one), value(two))
    return table


def value(field: Any) -> str:
    """A value of a config as JSON; `-` where the field is absent or null."""
    return "-" if field is None else field if isinstance(field, str) else json.dumps(field, ensure_ascii=False)


def modules(pairs: list[ModulePair]) -> Fitted:
    """How each of some modules is related, with the shares of the subspaces of A and B that both have."""
    table = named_rows(*COLUMNS)
    for pair in pairs:
        add_row(table, *cells_of(pair))
    return table


def cells_of(pair: ModulePair) -> tuple[str, ...]:
    """The row of a module."""
    name, relation = name_modules([path_of(pair.key)]), pair.relation
    if pair.kind == "elsewhere" and pair.source is not None:
        how = f"A and B of {name_modules([path_of(pair.source)])}"
    else:
        how = pair.why or pair.kind
    if relation is None or not relation.finite:
        return name, how, "-", "-", "-", "-", "-"
    numbers = ("-" if number is None else f"{number:.4f}" for number in (pair.cosine, relation.factor))
    shares = ("-" if share is None else f"{share:.1%}" for share in (relation.shared_rows, relation.shared_columns))
    return name, how, *numbers, _small(pair.share), *shares


def _small(number: float | None) -> str:
    return "-" if number is None else f"{number:.2g}"


def distances(diff: AdapterDiff) -> dict[Key, Cell]:
    """The distance of each module; those that could not be compared are bad."""
    return {
        pair.key: Cell(pair.kind if pair.share is None else f"{pair.share:.2g}", pair.share, pair.kind == "unread")
        for pair in diff.modules
    }
