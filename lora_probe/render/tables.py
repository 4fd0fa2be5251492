"""Tables that fit the width of the terminal without breaking a word of their headers.

In: cells. Out: rich renderables: a table, or where that is too wide a row for each module, or a paragraph for each
row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text as RichText

from lora_probe.names import Key, ShortName, in_layer, in_text, natural, one_or_more, path_of, short_names
from lora_probe.render.cells import words

HEAT = ("", "rgb(95,115,150)", "rgb(95,150,190)", "rgb(90,190,190)", "rgb(110,220,160)", "bold rgb(190,240,120)")
"""From small to large. Red is for what is wrong."""
MOST_COLUMNS = 12
"""A wider table is hard to read, and a hostile file can have thousands of projections."""
LONGEST_WORD = 32
"""The longest word in a cell that is never broken. Text without spaces is one word."""
_GAP = 2

Cells = Mapping[Key, tuple[float | None, str]]
"""The cell of each module: a number, which decides its colour, and its text."""


class Fitted(Table):
    """A table that is drawn only if no word has to be broken. Otherwise `narrow` is drawn, by default a paragraph for
    each row."""

    def __init__(self, *headers: str, narrow: RenderableType | None = None) -> None:
        super().__init__(box=None, padding=(0, _GAP, 0, 0), header_style="bold")
        self.narrow = narrow
        for header in headers:
            self.add_column(words(header), overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = _widths(self.columns, options.max_width)
        if widths is None:
            yield self.narrow or Group(*_paragraphs(self))
            return
        for column, width in zip(self.columns, widths, strict=True):
            column.width = width
        yield from super().__rich_console__(console, options)


def columns_of(*headers: str) -> Fitted:
    """A table without rows."""
    return Fitted(*headers)


def facts(*pairs: tuple[str, object]) -> Table:
    """Names and values below each other."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        add_row(table, name, value)
    return table


def add_row(table: Table, *cells: object) -> None:
    """A row of words. A cell that is styled already keeps its style."""
    table.add_row(*(cell if isinstance(cell, RichText) else words(cell) for cell in cells))


def _widths(columns: Sequence[Column], width: int) -> list[int] | None:
    """The width of each column, None if not all words fit. Narrow columns get all that they need first."""
    texts = [[_plain(column.header), *map(_plain, column.cells)] for column in columns]
    least = [
        max(
            _longest_word(header), column.min_width or 0, *(min(_longest_word(cell), LONGEST_WORD) for cell in cells), 1
        )
        for column, (header, *cells) in zip(columns, texts, strict=True)
    ]
    most = [max(low, *map(cell_len, cells)) for low, cells in zip(least, texts, strict=True)]
    spare = width - sum(least) - _GAP * len(columns)
    if spare < 0:
        return None
    widths = list(least)
    by_need = sorted(range(len(columns)), key=lambda at: most[at] - least[at])
    for done, at in enumerate(by_need):
        more = min(most[at] - least[at], spare // (len(columns) - done))
        widths[at] += more
        spare -= more
    return widths


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, RichText) else str(cell)


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _paragraphs(table: Table) -> list[RenderableType]:
    """The first cell of each row as a heading, and below it the other cells with their headers."""
    first, *others = table.columns
    parts: list[RenderableType] = []
    for heading, *cells in zip(first.cells, *(column.cells for column in others), strict=True):
        line = RichText(", ").join(
            RichText.assemble(f"{_plain(column.header)}: ", cell)
            for column, cell in zip(others, cells, strict=True)
            if _plain(cell)
        )
        parts += [heading, Padding(line, (0, 0, 0, 2))]
    return parts


def grid(title: str, cells: Cells) -> RenderableType:
    """Layers by projections: a table for each list of layers, or a row for each module where that is too wide."""
    names = short_names(map(path_of, cells))
    shade = _shader([value for value, _ in cells.values() if value is not None and np.isfinite(value)])
    shaded = {key: _cell(cells[key], shade) for key in sorted(cells, key=lambda key: natural(path_of(key)))}
    towers: dict[str, dict[ShortName, RichText]] = {}
    for key, cell in shaded.items():
        name = names[path_of(key)]
        towers.setdefault(name.words[0] if name.words else "", {})[name] = cell
    # Modules outside of all layers come last.
    ordered = sorted(towers.items(), key=lambda item: not item[0])
    return Group(words(title, style="bold"), *(_table(word, members) for word, members in ordered))


def _table(word: str, members: Mapping[ShortName, RichText]) -> RenderableType:
    rows = columns_of("module", "")
    for name, cell in members.items():
        add_row(rows, in_text([name]), cell)
    columns = {in_text([in_layer(name)]): None for name in members}
    if not word or len(columns) > MOST_COLUMNS:
        return rows
    table = Fitted(one_or_more(word, 1), *columns, narrow=rows)
    layers: dict[int, dict[str, RichText]] = {}
    for name, cell in members.items():
        layers.setdefault(name.numbers[0], {})[in_text([in_layer(name)])] = cell
    for number in sorted(layers):
        add_row(table, number, *(layers[number].get(column, words("-", style="dim")) for column in columns))
    return table


def _cell(cell: tuple[float | None, str], shade: Callable[[float], str]) -> RichText:
    value, text = cell
    return words(text, style="bold red" if value is None else shade(value))


def _shader(numbers: Sequence[float]) -> Callable[[float], str]:
    """A colour by the position of a value between the smallest and the largest."""
    finite = [number for number in numbers if math.isfinite(number)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)

    def shade(value: float) -> str:
        if not high > low or not math.isfinite(value):
            return ""
        return HEAT[1 + min(4, int(5 * (value - low) / (high - low)))]

    return shade
