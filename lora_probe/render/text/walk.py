"""`show --module` as text: one token through one layer, in one trace or in two side by side.

In: the `Walk` of each trace. Out: rich renderables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType

from lora_probe.comparison.walk import Walk
from lora_probe.recording.rows import TABLES
from lora_probe.render.cells import words
from lora_probe.render.tables import add_row, columns_of

NOT_RECORDED = "not recorded"
VECTORS = {"x": "x", "base": "base output", "delta": "s·x·A·B"}


def walks(every: Sequence[Walk]) -> RenderableType:
    """A column for each trace."""
    first = every[0]
    table = columns_of("", *(walk.engine for walk in every))
    for name, cells in _lines(every):
        add_row(table, name, *cells)
    parts: list[RenderableType] = [words(f"one token through {_module(first)}", style="bold"), table]
    parts += _numbers("x·Aᵀ, all numbers", [walk.shrink for walk in every], every, "record with --keep shrink")
    for name in TABLES:
        if any(name in walk.first for walk in every):
            title = f"the first values of {VECTORS[name]}"
            parts += _numbers(title, [walk.first.get(name) for walk in every], every, "record with --keep tensors")
    return Group(*parts)


def _module(walk: Walk) -> str:
    module, parameter, expert = walk.key
    return (
        module + (f" ({parameter})" if parameter != "weight" else "") + ("" if expert is None else f", expert {expert}")
    )


def _lines(every: Sequence[Walk]) -> Iterable[tuple[str, list[str]]]:
    yield "trace", [walk.trace for walk in every]
    yield "dtype", [walk.dtype or "?" for walk in every]
    yield "adapter", [f"{walk.load.name} (load {walk.load.load})" for walk in every]
    yield "layer in the engine", [walk.engine_as or walk.key[0] for walk in every]
    yield "request", [walk.request for walk in every]
    yield "token", [_token(walk) for walk in every]
    yield "‖x‖", [_number(walk.x_norm) + (f" ({walk.width} values)" if walk.width else "") for walk in every]
    yield "rank r", [NOT_RECORDED if walk.rank is None else str(walk.rank) for walk in every]
    yield "‖x·Aᵀ‖", [_number(None if walk.shrink is None else _norm(walk.shrink)) for walk in every]
    yield "scaling s", [_number(walk.scaling) for walk in every]
    yield "‖s·x·A·B‖", [_number(walk.delta_norm) for walk in every]
    yield "‖base output‖", [_number(walk.base_norm) for walk in every]
    yield "‖s·x·A·B‖ / ‖base output‖", [_number(walk.strength) for walk in every]
    yield "‖output‖", [_number(walk.output_norm) for walk in every]


def _token(walk: Walk) -> str:
    known = f", id {walk.token}" if walk.token is not None else ""
    return f"{walk.position}{known} ({'answer' if walk.decoded else 'prompt'})"


def _number(value: float | None) -> str:
    return NOT_RECORDED if value is None else f"{value:.7g}"


def _norm(values: Sequence[float]) -> float:
    return float(sum(value * value for value in values) ** 0.5)


def _numbers(
    title: str, columns: Sequence[Sequence[float] | None], every: Sequence[Walk], how: str
) -> Iterable[RenderableType]:
    """A row for each number, and a column for each trace."""
    yield words("")
    if all(values is None for values in columns):
        yield words(f"{title}: {NOT_RECORDED}; {how}", style="dim")
        return
    yield words(title, style="bold")
    table = columns_of("", *(walk.engine for walk in every), *(["difference"] if len(every) == 2 else []))
    for number in range(max(len(values or ()) for values in columns)):
        values = [None if column is None or number >= len(column) else column[number] for column in columns]
        cells = [NOT_RECORDED if value is None else f"{value:.8g}" for value in values]
        if len(values) == 2:
            one, two = values
            cells.append("" if one is None or two is None else f"{two - one:.2g}")
        add_row(table, str(number), *cells)
    yield table
