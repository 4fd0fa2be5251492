"""A result as a document: what every page, Markdown text and table of it is made of.

In: what the builders in `documents/` take from a result. Out: a `Document`: one sentence, the causes, facts, sections.
All strings are as they are in files, prompts and answers; each output makes them safe in its own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_probe.names import Key, one_or_more
from lora_probe.render.towers import Cell, Tower, towers

Tone = Literal["good", "bad", "open", "plain"]
"""`good`: judged, and nothing is wrong. `open`: not all of it could be judged. `plain`: nothing was judged."""


@dataclass(frozen=True)
class Finding:
    """A rule that found something. `severity` is that of a diagnostic; `details` are evidence, files, modules."""

    code: str
    name: str
    severity: str
    message: str
    hint: str = ""
    details: tuple[str, ...] = ()
    page: str = ""
    """The page of the rule: what is wrong, why it matters, how to fix it."""


@dataclass(frozen=True)
class Table:
    """A table. A row begins with its name; `bad` are the numbers of rows in which something is wrong."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bad: frozenset[int] = frozenset()
    about: str = ""


@dataclass(frozen=True)
class Measure:
    """What the cells of a heat map can show: a cell for each of its rows and columns, None where there is no module."""

    name: str
    cells: tuple[tuple[Cell | None, ...], ...]


@dataclass(frozen=True)
class Heat:
    """A heat map, with one or more measures to switch between. The whole name of a cell is that of its row and that of
    its column in `row_names` and `column_names`."""

    title: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    measures: tuple[Measure, ...]
    about: str = ""


@dataclass(frozen=True)
class Step:
    """A step of a timeline: `at` and `seconds` as texts, empty if unknown."""

    at: str
    stage: str
    text: str
    seconds: str = ""
    share: float = 0.0
    """How long it took, relative to the longest."""


@dataclass(frozen=True)
class Timeline:
    title: str
    steps: tuple[Step, ...]
    about: str = ""


@dataclass(frozen=True)
class Curves:
    """Small pictures side by side, one for each module: values from the largest to the smallest."""

    title: str
    about: str
    items: tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Lines:
    """Texts that stand for themselves, such as notes and answers."""

    title: str
    lines: tuple[str, ...]
    about: str = ""


Section = Table | Heat | Timeline | Curves | Lines


@dataclass(frozen=True)
class Document:
    """The document of one result. `title` is the command with its subject."""

    title: str
    verdict: str
    tone: Tone
    findings: tuple[Finding, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    sections: tuple[Section, ...] = field(default=())
    parts: tuple[Document, ...] = ()
    """The documents of several adapters, of which this one is the summary."""


Numbers = Mapping[Key, Cell]


def heats(title: str, measures: Mapping[str, Numbers], about: str = "") -> list[Heat]:
    """Layers by projections: a heat map for each list of layers; modules outside of all layers are rows of one."""
    keys = dict.fromkeys(key for cells in measures.values() for key in cells)
    found = []
    for tower in towers(keys):
        chosen = {name: _cells(tower, cells) for name, cells in measures.items()}
        told = tuple(Measure(name, cells) for name, cells in chosen.items() if any(map(any, cells)))
        if tower.tabular:
            word = one_or_more(tower.word, 1)
            rows, corner = tuple(map(str, tower.numbers)), word
            row_names = tuple(f"{word} {number}" for number in tower.numbers)
            found.append(Heat(title, corner, rows, tower.columns, row_names, tower.columns, told, about))
        else:
            rows = tuple(tower.labels.values())
            found.append(Heat(title, "module", rows, ("value",), rows, ("",), told, about))
    return found


def _cells(tower: Tower, cells: Numbers) -> tuple[tuple[Cell | None, ...], ...]:
    if not tower.tabular:
        return tuple((cells.get(key),) for key in tower.labels)
    keys = ((tower.keys.get((number, column)) for column in tower.columns) for number in tower.numbers)
    return tuple(tuple(None if key is None else cells.get(key) for key in row) for row in keys)


def key_of(entry: Mapping[str, Any]) -> Key:
    """The key of a module in JSON."""
    return entry["module"], entry["parameter"], entry["expert"]
