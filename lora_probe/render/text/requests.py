"""The requests of a recording as a table. Used by `show --requests`.

In: a `Recording`, and the totals of its rows. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rich.console import RenderableType

from lora_probe.comparison.totals import RequestRows, Totals
from lora_probe.render.cells import words
from lora_probe.render.json.trace import shown_requests
from lora_probe.render.results import Recording
from lora_probe.render.tables import Fitted, add_row, columns_of

MOST = 50
"""How many requests are shown without `--all`."""

_COLUMNS: Mapping[str, Callable[[RequestRows], object]] = {
    "prompt": lambda request: request.prompt,
    "rows": lambda request: request.rows,
    "positions": lambda request: f"{request.first}-{request.last}",
    "from cache": lambda request: request.cached,
    "missing": lambda request: request.missing,
    "decode": lambda request: request.decode,
    "repeated": lambda request: request.repeated,
    "cached by load": lambda request: ", ".join(map(str, request.cached_loads or ())),
    "preempted": lambda request: request.preemptions,
}


def requests_table(result: Recording, measured: Totals) -> Iterator[RenderableType]:
    """The last requests."""
    requests = shown_requests(result, measured)
    if not requests:
        yield words("no rows of requests are recorded")
        return
    table = requests_rows(result, measured)
    yield words(f"requests by their recorded rows: {_count(len(table.rows), len(requests))}", style="bold")
    yield table


def requests_rows(result: Recording, measured: Totals) -> Fitted:
    """A row for each of the last requests. Columns without a value in any of them are left out."""
    names = {load.load: load.name for load, _ in result.trace.loads}
    requests = shown_requests(result, measured)
    shown = requests if result.everything else requests[-MOST:]
    columns = {title: value for title, value in _COLUMNS.items() if any(map(value, shown))}
    table = columns_of("request", "adapter", "load", *columns)
    for request in shown:
        loads = [load for load in request.loads if load >= 0]
        adapters = dict.fromkeys(names.get(load, "?") for load in loads)
        values = (value(request) for value in columns.values())
        add_row(
            table,
            request.id,
            ", ".join(adapters) or "none",
            ", ".join(map(str, loads)) or "-",
            *(value or "-" for value in values),
        )
    return table


def _count(shown: int, every: int) -> str:
    return f"all {every:,}" if shown == every else f"the last {shown:,} of {every:,}; --all prints all of them"
