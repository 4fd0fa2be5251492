"""Tables that fit the width of the terminal without breaking a word of their headers.

In: cells. Out: rich renderables: a table, or where that is too wide a row for each module, or a paragraph for each
row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text as RichText

from lora_probe.names import Key, one_or_more
from lora_probe.render.cells import words
from lora_probe.render.console import detail
from lora_probe.render.strips import MANY, Strips, more, notable
from lora_probe.render.towers import Cell, Tower, extent, towers

HEAT = ("", "rgb(120,125,140)", "rgb(70,130,180)", "rgb(0,140,150)", "rgb(20,145,110)", "bold rgb(70,145,30)")
"""From small to large, each at least 3.9:1 against white and against black. Red is for what is wrong."""
LONGEST_WORD = 32
"""The longest word in a cell that is never broken. Text without spaces is one word."""
_GAP = 2


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


def named_rows(*headers: str) -> Fitted:
    """A table without rows, whose first column is never broken: the names of modules."""
    table = Fitted(*headers)
    table.columns[0].no_wrap = True
    return table


class Facts:
    """Names and values below each other. In a pipe a value stays on one line, so that programs can read it."""

    def __init__(self, *pairs: tuple[str, object]) -> None:
        self._pairs = [(name, words(value)) for name, value in pairs]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if console.is_terminal:
            table = Table.grid(padding=(0, 2))
            table.add_column(style="bold")
            table.add_column(overflow="fold")
            for pair in self._pairs:
                add_row(table, *pair)
            yield table
            return
        label = max((cell_len(name) for name, _ in self._pairs), default=0) + 2
        for name, value in self._pairs:
            line = words(f"{name}{' ' * (label - cell_len(name))}")
            line.stylize("bold")
            line.append_text(value)
            line.no_wrap, line.overflow = True, "ignore"
            yield line


def add_row(table: Table, *cells: object) -> None:
    """A row of words. A cell that is styled already keeps its style."""
    table.add_row(*(cell if isinstance(cell, RichText) else words(cell) for cell in cells))


def _widths(columns: Sequence[Column], width: int) -> list[int] | None:
    """The width of each column, None if not all words fit. Narrow columns get all that they need first."""
    texts = [[_plain(column.header), *map(_plain, column.cells)] for column in columns]
    least = [
        max(_longest_word(header), column.min_width or 0, *(_least(column, cell) for cell in cells), 1)
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


def _least(column: Column, cell: str) -> int:
    """The least width of a cell: that of its longest word, or of all of it."""
    return cell_len(cell) if column.no_wrap else min(_longest_word(cell), LONGEST_WORD)


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


class Grid:
    """Layers by projections: of few layers a table, of many a strip for each projection and the layers that matter;
    where a table is too wide, a row for each module. With `--verbose` all layers."""

    def __init__(self, title: str, cells: Mapping[Key, Cell]) -> None:
        self._title, self._cells = title, cells
        self._numbers = {key: cell.value for key, cell in cells.items()}
        self._wrong = frozenset(key for key, cell in cells.items() if cell.bad)
        self._shade = _shader(self._numbers.values())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shaded = {key: _cell(cell, self._shade) for key, cell in self._cells.items()}
        yield words(self._title, style="bold")
        for tower in towers(self._cells):
            if detail() == "verbose" or not tower.tabular or len(tower.numbers) <= MANY:
                yield _table(tower, shaded, tower.numbers)
                continue
            yield Strips(tower, self._numbers, self._wrong, self._shade)
            listed = notable(tower, self._numbers, self._wrong)
            yield _table(tower, shaded, listed)
            yield words(more(len(tower.numbers) - len(listed), tower.word), style="dim")


def _table(tower: Tower, cells: Mapping[Key, RichText], layers: Sequence[int]) -> RenderableType:
    rows = columns_of("module", "")
    places, listed = {key: layer for (layer, _), key in tower.keys.items()}, set(layers)
    for key, label in tower.labels.items():
        if places.get(key) in listed or not tower.word:
            add_row(rows, label, cells[key])
    if not tower.tabular:
        return rows
    table = Fitted(one_or_more(tower.word, 1), *tower.columns, narrow=rows)
    for number in layers:
        keys = [tower.keys.get((number, column)) for column in tower.columns]
        add_row(table, number, *(words("-", style="dim") if key is None else cells[key] for key in keys))
    return table


def _cell(cell: Cell, shade: Callable[[float], str]) -> RichText:
    style = "bold red" if cell.bad else "" if cell.value is None else shade(cell.value)
    return words(cell.text, style=style)


def _shader(numbers: Iterable[float | None]) -> Callable[[float], str]:
    """A colour by the position of a value between the smallest and the largest."""
    low, high = extent(numbers)

    def shade(value: float) -> str:
        if not high > low or not math.isfinite(value):
            return ""
        return HEAT[1 + min(4, int(5 * (value - low) / (high - low)))]

    return shade
