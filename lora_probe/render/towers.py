"""Modules as tables: each list of layers is a tower of layers by projections.

In: the keys of modules, and a cell for each. Out: towers; modules outside of all layers are in one of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lora_probe.names import Key, ShortName, in_layer, in_text, natural, path_of, short_names

MOST_COLUMNS = 12
"""A wider table is hard to read, and a hostile file can have thousands of projections."""


@dataclass(frozen=True)
class Cell:
    """`value` decides the shade; None for what is no number. `bad`: something is wrong there."""

    text: str
    value: float | None = None
    bad: bool = False


@dataclass(frozen=True)
class Tower:
    """A list of layers. `word` is what its layers are called (`layers`, `encoder layers`), empty for modules outside of
    all layers. `keys` are the modules by the number of their layer and their column. `labels` names each module."""

    word: str
    numbers: tuple[int, ...]
    columns: tuple[str, ...]
    keys: dict[tuple[int, str], Key]
    labels: dict[Key, str]

    @property
    def tabular(self) -> bool:
        """Whether it is shown as layers by projections; otherwise as a row for each module."""
        return bool(self.word) and len(self.columns) <= MOST_COLUMNS


def towers(keys: Iterable[Key]) -> list[Tower]:
    """The towers in the order of their first modules; modules outside of all layers come last."""
    ordered = sorted(keys, key=lambda key: natural(path_of(key)))
    names = short_names(map(path_of, ordered))
    members: dict[str, dict[Key, ShortName]] = {}
    for key in ordered:
        name = names[path_of(key)]
        members.setdefault(name.words[0] if name.words else "", {})[key] = name
    return [_tower(word, members[word]) for word in sorted(members, key=lambda word: not word)]


def _tower(word: str, members: dict[Key, ShortName]) -> Tower:
    columns = dict.fromkeys(in_text([in_layer(name)]) for name in members.values())
    places = {(name.numbers[0], in_text([in_layer(name)])): key for key, name in members.items() if word}
    numbers = tuple(sorted({number for number, _ in places}))
    return Tower(word, numbers, tuple(columns), places, {key: in_text([name]) for key, name in members.items()})


def extent(values: Iterable[float | None]) -> tuple[float, float]:
    """The smallest and the largest number among values; 0 if there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def number(value: float | None, digits: int = 3, bad: bool = False) -> Cell:
    """A cell with a number; `-` where there is none."""
    return Cell("-" if value is None else f"{value:.{digits}g}", value, bad)
