"""The load timeline of a recording as text. Used by `trace` and `show`.

In: load events. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    groups = [[event] for event in events] if whole else _alike(events)
    universes = {} if whole else _universes(events)
    for group in groups if whole else groups[:STEPS]:
        first, count = group[0], len(group)
        times = [event.seconds for event in group if event.seconds is not None]
        where = first.module if count == 1 else _modules(group, universes[first.stage])
        add_row(
            table,
            f"{first.at:.3f} s",
            first.stage,
            f"{where}  {first.text}" if where else first.text,
            _duration(sum(times)) if times else "",
        )
    yield table
    if not whole and len(groups) > STEPS:
        yield words(f"{len(groups) - STEPS:,} more lines; --events prints all of them")


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


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
