"""The load timeline of a recording as text. Used by `trace` and `show`.

In: load events. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table

from lora_probe.names import Universe, name_modules
from lora_probe.render.cells import words
from lora_probe.render.tables import add_row

if TYPE_CHECKING:
    from lora_probe.recording import LoadEvent

MOST_NAMED = 200_000
"""More modules than any adapter has are only counted: names would take more memory than the trace."""
STEPS = 200
"""How many lines of the load timeline are printed without `--events`."""


def timeline(events: Sequence[LoadEvent], whole: bool) -> Iterable[RenderableType]:
    """The steps of loading. Without `whole`, equal steps on many modules share a line."""
    table = Table.grid(padding=(0, 2))
    for justify in ("right", "left", "left", "right"):
        table.add_column(justify=justify, overflow="fold")
    lines = list(story(events, whole))
    for line in lines if whole else lines[:STEPS]:
        add_row(table, f"{line.at:.3f} s", line.stage, line.text, duration(line.seconds))
    yield table
    if not whole and len(lines) > STEPS:
        yield words(f"{len(lines) - STEPS:,} more lines; --events prints all of them")


@dataclass(frozen=True)
class Line:
    """A step of loading: `at` is the seconds from the start to it, `seconds` how long it took, if that is known."""

    at: float
    stage: str
    text: str
    seconds: float | None


def story(events: Sequence[LoadEvent], whole: bool) -> Iterator[Line]:
    """The steps of loading. Without `whole`, equal steps on many modules share a line."""
    groups = [[event] for event in events] if whole else _alike(events)
    universes = {} if whole else _universes(events)
    for group in groups:
        first, count = group[0], len(group)
        times = [event.seconds for event in group if event.seconds is not None]
        where = first.module if count == 1 else _modules(group, universes[first.stage])
        text = f"{where}  {first.text}" if where else first.text
        yield Line(first.at, first.stage, text, sum(times) if times else None)


def _alike(events: Iterable[LoadEvent]) -> list[list[LoadEvent]]:
    """Steps on modules with the same text in one group, up to the next step that is not about a module."""
    groups: list[list[LoadEvent]] = []
    current: dict[tuple[str, str], list[LoadEvent]] = {}
    for event in events:
        kind = event.stage, event.text
        if not event.module:
            current.clear()
            groups.append([event])
        elif kind in current:
            current[kind].append(event)
        else:
            groups.append([event])
            current[kind] = groups[-1]
    return groups


def _universes(events: Iterable[LoadEvent]) -> dict[str, Universe]:
    """The modules of each stage. The names of a module in the file and in the engine are not compared."""
    modules: dict[str, dict[str, None]] = {}
    for event in events:
        if event.module:
            modules.setdefault(event.stage, {})[event.module] = None
    return {stage: Universe(tuple(paths)) for stage, paths in modules.items()}


def _modules(group: Sequence[LoadEvent], universe: Universe) -> str:
    if len(universe.paths) > MOST_NAMED:
        return f"{len(group):,} modules"
    return f"{len(group)}: {name_modules([event.module for event in group], universe)}"


def duration(seconds: float | None) -> str:
    """`25.8 ms`, `1.2 s`, or nothing."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
