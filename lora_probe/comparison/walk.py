"""One token through one layer: what `x`, `x·Aᵀ` and `s·x·A·B` are there.

In: a `Trace`, the path of a module, a request and a position. Out: a `Walk` with the numbers that were recorded of this
row. Two traces of the same tokens give two walks that can be read side by side.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_probe.errors import ProbeError
from lora_probe.files import shown
from lora_probe.names import Key, in_words, ranges
from lora_probe.precision import finite
from lora_probe.recording import DECODE, Floats, Load, RequestRecord, Rows, Trace
from lora_probe.recording.rows import TABLES

FIRST = 8
"""So many values of a whole vector are shown."""
MOST = 10
"""So many names are listed in an error."""


@dataclass(frozen=True)
class Walk:
    """One row at one module. Numbers that were not recorded are None. `token` is its id; `shrink` is x·Aᵀ without the
    scaling, as the file has A; `first` are the first values of whole vectors (`x`, `base`, `delta`), by name."""

    trace: str
    engine: str
    dtype: str
    load: Load
    key: Key
    engine_as: str | None
    request: str
    position: int
    token: int | None
    decoded: bool
    rank: int | None
    scaling: float | None
    x_norm: float | None
    shrink: tuple[float, ...] | None
    delta_norm: float | None
    base_norm: float | None
    output_norm: float | None
    width: int | None
    first: Mapping[str, tuple[float, ...]]

    @property
    def strength(self) -> float | None:
        """‖s·x·A·B‖ / ‖base output‖."""
        return self.delta_norm / self.base_norm if self.delta_norm is not None and self.base_norm else None


def walk(
    trace: Trace,
    module: str,
    request: str | None = None,
    position: int | None = None,
    adapter: str | None = None,
    load: int | None = None,
) -> Walk:
    """The row of `request` (default: the first one of an adapter) at `position` (default: the last token of its prompt;
    a negative one counts from the end) at `module`, a path or its unique end. Only rows of `adapter` and of `load` are
    looked at, if they are given.

    Raises:
        ProbeError: the trace has no such row, request or module, or no rows at all.
    """
    if trace.unjoined:
        raise ProbeError(f"the rows in `{trace.path}` cannot be joined: {trace.unjoined}")
    of_load, rows = _with_request(trace, request, adapter, load)
    name = request or _default(trace, rows)
    key = _module(rows, module)
    chosen = _row(rows, name, position, _record(trace, name))
    return _walked(trace, of_load, rows, key, name, chosen)


def beside(trace: Trace, first: Trace, walked: Walk) -> Walk:
    """The same token through the same layer in another trace: that of the request with the same tokens up to there, as
    engines give requests ids of their own.

    Raises:
        ProbeError: as `walk`, or no request has these tokens.
    """
    record = _record(first, walked.request)
    if record is None:
        return walk(trace, walked.key[0], walked.request, walked.position)
    tokens = _tokens(record)[: walked.position + 1]
    same = [answer for answer in trace.requests if answer.adapter is not None and _begins(answer, tokens)]
    # Two adapters may have been asked the same.
    same.sort(key=lambda answer: answer.adapter != record.adapter)
    if not same:
        raise ProbeError(
            f"no request of an adapter in `{trace.path}` has the tokens of `{shown(walked.request)}` up to "
            f"{walked.position}",
            f"record it with the same tokens: lora-probe trace CKPT --engine ... --follow {first.path}",
        )
    return walk(trace, walked.key[0], same[0].id, walked.position)


def _tokens(record: RequestRecord) -> list[int]:
    return [*record.prompt_ids, *record.output_ids]


def _begins(record: RequestRecord, tokens: Sequence[int]) -> bool:
    return _tokens(record)[: len(tokens)] == list(tokens)


def _with_request(trace: Trace, request: str | None, adapter: str | None, number: int | None) -> tuple[Load, Rows]:
    """The load that served the request, with its rows."""
    names: dict[str, None] = {}
    for load, _ in trace.loads:
        if adapter not in (None, load.name) or number not in (None, load.load):
            continue
        rows = trace.rows_of(load.load)
        if rows is None or not len(rows):
            continue
        if request is None or request in rows.requests:
            return load, rows
        names |= dict.fromkeys(rows.requests)
    if not names:
        of = f"`{shown(adapter)}`" if adapter is not None else "an adapter"
        of += f" in load {number}" if number is not None else ""
        raise ProbeError(
            f"`{trace.path}` contains no rows of {of}", "record them with --keep shrink, or let a request use it"
        )
    raise ProbeError(
        f"no request `{shown(str(request))}` with an adapter in `{trace.path}`", f"requests: {_listed(list(names))}"
    )


def _default(trace: Trace, rows: Rows) -> str:
    answered = [answer.id for answer in trace.requests if answer.adapter is not None and answer.id in rows.requests]
    return answered[0] if answered else rows.requests[0]


def _record(trace: Trace, request: str) -> RequestRecord | None:
    return next((answer for answer in trace.requests if answer.id == request), None)


def _module(rows: Rows, name: str) -> Key:
    """The module that is called `name`, or ends in it."""
    wanted = name.strip().strip(".")
    paths = {key[0] if key[2] is None else f"{key[0]}.{key[2]}": key for key in rows.modules}
    exact = [key for path, key in paths.items() if path == wanted]
    ends = [key for path, key in paths.items() if path.endswith(f".{wanted}")]
    for matches in (exact, ends):
        if len(matches) == 1 and wanted:
            return matches[0]
        if matches and wanted:
            raise ProbeError(
                f"`{shown(name)}` matches {len(matches)} modules", f"pass one of {_listed([key[0] for key in matches])}"
            )
    close = difflib.get_close_matches(wanted[:200], list(paths), 3, 0.0)
    raise ProbeError(f"no module `{shown(name)}` has rows in this trace", f"did you mean {_listed(close)}?")


def _row(rows: Rows, request: str, position: int | None, record: RequestRecord | None) -> int:
    """The number of the row at a position. Of a row that was computed twice, the last one counts."""
    numbers = {
        int(rows.position[number]): int(number)
        for number in np.flatnonzero(rows.request == rows.requests.index(request))
    }
    positions = sorted(numbers)
    if position is None:
        wanted = len(record.prompt_ids) - 1 if record is not None and record.prompt_ids else positions[-1]
        return numbers.get(wanted, numbers[positions[-1]])
    at = positions[-1] + 1 + position if position < 0 else position
    if at not in numbers:
        raise ProbeError(
            f"no row at token {position} of request `{shown(request)}`",
            f"its rows are those of tokens {ranges(positions)}; the first ones may come from the prefix cache",
        )
    return numbers[at]


def _walked(trace: Trace, load: Load, rows: Rows, key: Key, request: str, row: int) -> Walk:
    column = rows.modules.index(key)
    facts = trace.modules.get((load.load, key))
    process = trace.workers[0].process
    position = int(rows.position[row])
    rank = facts.rank if facts is not None else None
    shrink = None if rows.shrink is None else _numbers(rows.shrink[row, column, :rank])
    vectors = {name: table[key][row] for name in TABLES if key in (table := getattr(rows, name) or {})}
    return Walk(
        trace=str(trace.path),
        engine=trace.engine,
        dtype=process.dtype,
        load=load,
        key=key,
        engine_as=facts.engine_as if facts is not None else None,
        request=request,
        position=position,
        token=_token(_record(trace, request), position),
        decoded=bool(rows.phase[row] == DECODE),
        rank=rank,
        scaling=facts.scaling if facts is not None else None,
        x_norm=_number(rows.x_norm[row, column]),
        shrink=shrink,
        delta_norm=_number(rows.delta_norm[row, column]),
        base_norm=_number(rows.base_norm[row, column]),
        output_norm=_number(rows.output_norm[row, column]),
        width=len(vectors["x"]) if "x" in vectors else None,
        first={name: _numbers(values[:FIRST]) for name, values in vectors.items()},
    )


def _token(record: RequestRecord | None, position: int) -> int | None:
    ids = _tokens(record) if record is not None else []
    return ids[position] if 0 <= position < len(ids) else None


def _number(value: Any) -> float | None:
    return finite(float(value))


def _numbers(values: Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return in_words([f"`{shown(name)}`" for name in names[:MOST]]) + more
