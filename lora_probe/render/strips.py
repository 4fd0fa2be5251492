"""Layers in a few lines: a strip of cells for each projection, and the layers that matter.

In: the towers of `towers.py` with the values of their modules. Out: rich renderables that fit the width. A value is a
block between the lowest and the highest, also without colours. Where something is wrong, the block is red; without
colours, or without a value, it is `!`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text as RichText

from lora_probe.names import Key, one_or_more, ranges
from lora_probe.render.cells import words
from lora_probe.render.towers import Tower, extent

BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "01234567"
"""From low to high; digits where the output cannot show blocks."""
MANY = 12
"""Up to this many layers a table is as short as strips with the layers that matter."""
LISTED = 6
"""Layers that are listed because something is wrong in them."""
LEAST = 8
"""The least cells of a line."""

Numbers = Mapping[Key, float | None]


def notable(tower: Tower, numbers: Numbers, wrong: frozenset[Key]) -> list[int]:
    """The layers with something wrong, up to `LISTED` of them, the worst ones; and those with the smallest and the
    largest value."""
    worst: dict[int, float] = {}
    for (layer, _), key in tower.keys.items():
        if key in wrong:
            value = numbers.get(key)
            worst[layer] = max(worst.get(layer, -math.inf), math.inf if value is None else value)
    chosen = sorted(worst, key=lambda layer: -worst[layer])[:LISTED]
    values = {(value, place) for place, key in tower.keys.items() if (value := numbers.get(key)) is not None}
    for end in (min, max) if values else ():
        chosen.append(end(values)[1][0])
    return sorted(set(chosen))


@dataclass(frozen=True)
class Strips:
    """A line of cells for each column of a tower, broken where the width ends. `shade` is the style of a value."""

    tower: Tower
    numbers: Numbers
    wrong: frozenset[Key]
    shade: Callable[[float], str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = BLOCKS if options.encoding.lower().startswith("utf") else DIGITS
        low, high = extent(self.numbers.values())
        yield words(f"{blocks[0]} {low:.3g}  {blocks[-1]} {high:.3g}", style="dim")
        label = max(map(cell_len, self.tower.columns))
        room = max(LEAST, options.max_width - label - 2)
        for begin in range(0, len(self.tower.numbers), room):
            layers = self.tower.numbers[begin : begin + room]
            yield words(f"{'':{label}}  {self.tower.word} {ranges(list(layers))}", style="dim")
            for column in self.tower.columns:
                line = words(f"{column}{' ' * (label - cell_len(column))}  ")
                for layer in layers:
                    key = self.tower.keys.get((layer, column))
                    line.append_text(self._cell(key, blocks, low, high, bool(console.color_system)))
                line.no_wrap, line.overflow = True, "crop"
                yield line

    def _cell(self, key: Key | None, blocks: str, low: float, high: float, coloured: bool) -> RichText:
        value, wrong = None if key is None else self.numbers.get(key), key in self.wrong
        known = value is not None and math.isfinite(value)
        if wrong and not (known and coloured):
            return RichText("!", style="bold red")
        if value is None or not known:
            return RichText("·" if blocks == BLOCKS else ".", style="dim")
        at = 0 if high <= low else min(len(blocks) - 1, int(len(blocks) * (value - low) / (high - low)))
        return RichText(blocks[at], style="bold red" if wrong else self.shade(value))


def more(count: int, word: str) -> str:
    """How many layers are not listed: `27 more layers: -v`."""
    return f"{count} more {one_or_more(word, count)}: -v"
