"""The parts that all text output is made of: words, rows, and the table of layers by projections.

In: strings from untrusted files, and numbers. Out: rich renderables in which nothing from a file acts as markup or as a
control character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from lora_probe.names import LAYER, Key, layer_of, natural

if TYPE_CHECKING:
    from lora_probe.rules import Severity

HEAT = ("", "rgb(95,115,150)", "rgb(95,150,190)", "rgb(90,190,190)", "rgb(110,220,160)", "bold rgb(190,240,120)")
"""From small to large. Red is for what is wrong."""
SEVERITIES: dict[Severity, str] = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}
"""The style of a diagnostic's severity, the worst first."""
SHOWN = 10
"""How many similar lines are printed before the rest is only counted."""
DIRECTION = (0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
SURROGATES = range(0xD800, 0xE000)
CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *DIRECTION, *SURROGATES), "�")
"""Control characters, line separators, changes of direction and bytes that are not text. None of them is printed."""
LONGEST = 4000
"""How many characters of one string from a file, an answer or a log are printed."""
_LINE = CONTROL | {9: " ", 10: "�"}
_ORDER = re.compile(r":(?=:)|##(?=\[)")


def one_line(content: object) -> str:
    """A string from a file, an answer or a log, safe to print: one line, without control characters, not too long.

    A workflow runner treats `::` at the start of a line, and `##[` anywhere, as a command: a space breaks both up.
    """
    text = str(content)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({len(text) - LONGEST:,} more characters)"
    return _ORDER.sub(r"\g<0> ", text.translate(_LINE))


def size(count: int) -> str:
    """Bytes in MiB with three digits, or in KiB if it is less than one MiB."""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"


def words(content: object, style: str = "") -> RichText:
    """One line of words without markup, cleaned by `one_line`."""
    return RichText(one_line(content), style=style)


def paragraphs(text: str) -> RichText:
    """Several lines of text that is ours."""
    return RichText("\n").join(words(line) for line in text.split("\n"))


def assemble(*parts: str | tuple[str, str]) -> RichText:
    """Words in several styles on one line."""
    whole = RichText()
    for part in parts:
        whole.append_text(words(part) if isinstance(part, str) else words(*part))
    return whole


def columns_of(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(words(column), overflow="fold")
    return table


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


def grid(title: str, cells: Mapping[Key, tuple[float | None, str]]) -> RenderableType:
    """A table of layers by projections. A cell is a number, which decides its colour, and its text."""
    labels = _labels(cells)
    columns = sorted(set(labels.values()), key=natural)
    shade = _shader([value for value, _ in cells.values() if value is not None and np.isfinite(value)])
    heading = words(title, style="bold")
    if len(columns) > MOST_COLUMNS:
        return Group(heading, _list(cells, shade))
    table = columns_of("layer", *columns)
    rows: dict[str, dict[str, tuple[float | None, str]]] = {}
    for key, cell in cells.items():
        layer = layer_of(key[0])
        rows.setdefault("-" if layer is None else str(layer), {})[labels[key]] = cell
    for name in sorted(rows, key=lambda name: (name == "-", natural(name))):
        add_row(table, name, *(_cell(rows[name].get(column), shade) for column in columns))
    return Group(heading, table)


MOST_COLUMNS = 100
"""A wider table is unreadable and mostly empty: a hostile file can have thousands of projections."""


def _list(cells: Mapping[Key, tuple[float | None, str]], shade: Callable[[float], str]) -> RenderableType:
    """A line for each module."""
    table = columns_of("module", "")
    for key in sorted(cells, key=lambda key: natural(key[0])):
        add_row(table, _named(key), _cell(cells[key], shade))
    return table


def _labels(keys: Iterable[Key]) -> dict[Key, str]:
    """The column of each module: its projection, or as much of its path as is unique in its layer."""
    stems = {key: _stem(key) for key in keys}
    labels: dict[str, str] = {}
    for shorten in (_projection, _in_layer, str):
        taken: dict[str, set[str]] = {}
        for stem in set(stems.values()) - labels.keys():
            taken.setdefault(shorten(stem), set()).add(stem)
        labels |= {min(stems_of): label for label, stems_of in taken.items() if len(stems_of) == 1}
    return {key: labels[stem] for key, stem in stems.items()}


def _stem(key: Key) -> str:
    """The path with `*` for the layer's number, and with the parameter and the expert if there are several."""
    module, parameter, expert = key
    match = LAYER.search(module)
    return _named((f"{module[: match.start(1)]}*{module[match.end(1) :]}" if match else module, parameter, expert))


def _named(key: Key) -> str:
    module, parameter, expert = key
    path = module + ("" if parameter == "weight" else f".{parameter}")
    return path if expert is None else f"{path}[{expert}]"


def _projection(stem: str) -> str:
    return stem.rpartition(".")[2]


def _in_layer(stem: str) -> str:
    return stem.rpartition("*.")[2]


def _cell(cell: tuple[float | None, str] | None, shade: Callable[[float], str]) -> RichText:
    if cell is None:
        return words("-", style="dim")
    value, text = cell
    return words(text, style="bold red" if value is None else shade(value))


def _shader(numbers: Sequence[float]) -> Callable[[float], str]:
    """A colour by the position of a value between the smallest and the largest."""
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 0.0)

    def shade(value: float) -> str:
        if not high > low:
            return ""
        return HEAT[1 + min(4, int(5 * (value - low) / (high - low)))]

    return shade
