"""Which layer contributes at which token: heat maps with the tokens of a request along one axis.

In: a trace with rows. Out: a `Heat` for each of the first requests of an adapter, to switch between projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from lora_probe.comparison.recorded import recorded_rows
from lora_probe.names import Key, one_or_more
from lora_probe.recording import Floats, RequestRecord, Rows, Trace
from lora_probe.recording.rows import places
from lora_probe.render.document import Heat, Measure
from lora_probe.render.towers import Cell, Tower, number, towers

MOST_ROWS = 20_000
"""Of a longer trace the rows are not read for a picture."""
MOST_REQUESTS, MOST_TOKENS = 2, 48
"""Requests that are shown, and tokens of each."""
MOST_CELLS = 8_000
"""With more cells, the projections are shown together only."""
ALL = "all projections"


def token_heats(trace: Trace) -> Iterator[Heat]:
    """The contribution of each layer at each token, of the first requests for an adapter."""
    if not 0 < recorded_rows(trace) <= MOST_ROWS or (rows := trace.rows) is None:
        return
    found = places(rows)
    asked = [request for request in trace.answers if request.adapter is not None]
    left = f" {len(asked) - MOST_REQUESTS} more requests are not shown." if len(asked) > MOST_REQUESTS else ""
    texts = [prompt.text for prompt in trace.run.spec.prompts] if trace.run else []
    for request in asked[:MOST_REQUESTS]:
        tokens = [*request.prompt_ids, *request.output_ids]
        known = ((position, found.get((request.id, position))) for position in range(len(tokens)))
        shown = [(position, row) for position, row in known if row is not None][:MOST_TOKENS]
        for tower in towers(rows.modules):
            if shown and tower.tabular:
                text = texts[request.prompt] if 0 <= request.prompt < len(texts) else ""
                heat = _heat(rows, tower, request, shown, text)
                yield replace(heat, about=heat.about + left)


def _heat(rows: Rows, tower: Tower, request: RequestRecord, at: list[tuple[int, int]], text: str) -> Heat:
    columns = {key: number for number, key in enumerate(rows.modules)}
    chosen = [row for _, row in at]
    measures = [Measure(ALL, _cells(rows, tower, columns, chosen, tower.columns))]
    if 1 < len(tower.columns) < MOST_CELLS // (len(tower.numbers) * len(at)):
        measures += [Measure(name, _cells(rows, tower, columns, chosen, (name,))) for name in tower.columns]
    tokens = [*request.prompt_ids, *request.output_ids]
    begin = len(request.prompt_ids)
    labels = [f"{'answer' if p >= begin else 'prompt'} token {p - begin + 1 if p >= begin else p + 1}" for p, _ in at]
    told = [f"{label} (id {tokens[position]})" for label, (position, _) in zip(labels, at, strict=True)]
    headers = tuple(f"{position - begin + 1}" if position >= begin else f"p{position + 1}" for position, _ in at)
    word = one_or_more(tower.word, 1)
    row_names = tuple(f"{word} {layer}," for layer in tower.numbers)
    about = "Contribution ‖s·x·A·B‖ / ‖base output‖ of each layer at each token: p1 is the first token of the prompt,"
    about += " 1 the first of the answer."
    if len(tokens) > len(at):
        about += f" {len(at)} of {len(tokens)} tokens have rows that are shown."
    title = f"Tokens of prompt {request.prompt + 1}{f': {text}' if text else ''}"
    return Heat(title, word, tuple(map(str, tower.numbers)), headers, row_names, tuple(told), tuple(measures), about)


def _cells(
    rows: Rows, tower: Tower, columns: Mapping[Key, int], chosen: list[int], projections: tuple[str, ...]
) -> tuple[tuple[Cell | None, ...], ...]:
    """The root of the sum of squares over some projections, relative to that of their base outputs."""
    cells = []
    for layer in tower.numbers:
        keys = [tower.keys[layer, name] for name in projections if (layer, name) in tower.keys]
        places_of = [columns[key] for key in keys]
        delta, base = (_length(values[chosen][:, places_of]) for values in (rows.delta_norm, rows.base_norm))
        with np.errstate(divide="ignore", invalid="ignore"):
            strengths = delta / base
        cells.append(tuple(number(float(value), 2) if np.isfinite(value) else Cell("-") for value in strengths))
    return tuple(cells)


def _length(values: Floats) -> Floats:
    length: Floats = np.sqrt(np.nansum(np.square(values.astype(np.float64)), axis=1))
    return length
