"""The pieces that the terminal's pages are made of: words, rows, and the table of layers by projections.

In: strings out of files that nobody vouches for, and numbers. Out: rich renderables without markup or control
characters of the files' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from lora_probe.adapter import LAYER, Key, layer_of, natural

HEAT = ("", "rgb(95,115,150)", "rgb(95,150,190)", "rgb(90,190,190)", "rgb(110,220,160)", "bold rgb(190,240,120)")
"""From little to much. Red is for what is wrong."""
DIRECTION = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
SURROGATES = range(0xD800, 0xE000)
CONTROL = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *DIRECTION, *SURROGATES), "�")
"""Control characters of names in files that nobody vouches for, and bytes that are no text."""


def words(content: object, style: str = "") -> RichText:
    """Words as they are: no markup, no control characters."""
    return RichText(str(content).translate(CONTROL), style=style)


def one_line(content: object) -> str:
    """What is said in one line, whatever the names in it hold; a workflow's runner takes nothing in it for an order."""
    return str(content).replace("\n", "�").replace("\t", " ").replace("##[", "## [")


def assemble(*parts: str | tuple[str, str]) -> RichText:
    """Words of several styles in one line."""
    whole = RichText()
    for part in parts:
        whole.append_text(words(part) if isinstance(part, str) else words(*part))
    return whole


def columns_of(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(words(column), overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """A row of words; what is styled already stays so."""
    table.add_row(*(cell if isinstance(cell, RichText) else words(cell) for cell in cells))


def grid(title: str, cells: Mapping[Key, tuple[float | None, str]]) -> RenderableType:
    """A table of layers by projections. A cell is a number for the colour and the text that is read."""
    labels = _labels(cells)
    columns = sorted(set(labels.values()), key=natural)
    table = columns_of("layer", *columns)
    rows: dict[str, dict[str, tuple[float | None, str]]] = {}
    for key, cell in cells.items():
        layer = layer_of(key[0])
        rows.setdefault("-" if layer is None else str(layer), {})[labels[key]] = cell
    numbers = [value for value, _ in cells.values() if value is not None and np.isfinite(value)]
    shade = _shader(numbers)
    for name in sorted(rows, key=lambda name: (name == "-", natural(name))):
        add_row(table, name, *(_cell(rows[name].get(column), shade) for column in columns))
    return Group(words(title, style="bold"), table)


def _labels(keys: Iterable[Key]) -> dict[Key, str]:
    """The column of each module: its projection, or as much of its path as tells it from others of its layer."""
    stems = {key: _stem(key) for key in keys}
    labels: dict[str, str] = {}
    for shorten in (_projection, _in_layer, str):
        taken: dict[str, set[str]] = {}
        for stem in set(stems.values()) - labels.keys():
            taken.setdefault(shorten(stem), set()).add(stem)
        labels |= {min(stems_of): label for label, stems_of in taken.items() if len(stems_of) == 1}
    return {key: labels[stem] for key, stem in stems.items()}


def _stem(key: Key) -> str:
    """The path with `*` for the layer's number, and what tells parameters and experts of a module apart."""
    module, parameter, expert = key
    match = LAYER.search(module)
    path = f"{module[: match.start(1)]}*{module[match.end(1) :]}" if match else module
    path += "" if parameter == "weight" else f".{parameter}"
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
    """A colour by where a value lies between the smallest and the largest."""
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 0.0)

    def shade(value: float) -> str:
        if not high > low:
            return ""
        return HEAT[1 + min(4, int(5 * (value - low) / (high - low)))]

    return shade
