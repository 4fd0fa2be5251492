"""What the rows of a trace add up to: the contributions of each load, and the rows of each request.

In: a `Trace`, and the loads whose contributions are wanted. Out: `Totals`. Rows are read segment by segment, and only
the columns that are needed, so memory does not grow with the number of modules. Rows of several loads are never added
up. A row that was computed twice, after a preemption, counts once: the last one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.errors import UnreadableFile, out_of_memory
from lora_probe.files.limits import step
from lora_probe.files.values import read_chunk
from lora_probe.ledger import Ledger
from lora_probe.names import Key
from lora_probe.precision import finite
from lora_probe.recording import DECODE, Served, Trace
from lora_probe.recording.rows import places
from lora_probe.recording.segments import Segment, values

AT_ONCE = 2**22
"""Values of a column that are in memory at the same time."""

_Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Contribution:
    """What one module contributed over the rows of one load: sqrt(Σ‖delta‖²) and sqrt(Σ‖base output‖²)."""

    key: Key
    rows: int
    delta_norm: float
    base_norm: float

    @property
    def strength(self) -> float | None:
        """The contribution relative to the base output; None if it is not a number."""
        return finite(self.delta_norm / self.base_norm) if self.base_norm else None


@dataclass(frozen=True)
class RequestRows:
    """The recorded rows of one request. `rows` and `decode` count positions; `repeated` counts the rows that were
    computed again, after a preemption. `cached` counts the positions at the beginning without a row, as they were
    served from the prefix cache; `missing` all other positions before the last row that are not recorded.

    `prompt` is the number of its tokens, None if neither a client nor the rows show it. `cached_loads` are the loads
    that computed the cached positions, None if that is not known; `preemptions` is how often it was preempted."""

    id: str
    loads: tuple[int, ...]
    rows: int
    first: int
    last: int
    cached: int
    missing: int
    decode: int
    repeated: int
    prompt: int | None
    cached_loads: list[int] | None = None
    preemptions: int = 0


@dataclass(frozen=True)
class Totals:
    """`contributions` and `rows` are by the number of the load; `requests` are in the order in which their first rows
    were written."""

    contributions: Mapping[int, tuple[Contribution, ...]]
    rows: Mapping[int, int]
    requests: tuple[RequestRows, ...]


@dataclass(frozen=True)
class _Index:
    """All rows, without their measurements. `counted` is False for rows that were computed again later; `loads` are
    those that each request ran with."""

    requests: tuple[str, ...]
    request: _Numbers
    position: _Numbers
    decode: npt.NDArray[np.bool_]
    load: _Numbers
    counted: npt.NDArray[np.bool_]
    loads: Mapping[int, list[int]]


@dataclass
class _Sums:
    """The sums of squares of one load, by module."""

    rows: dict[Key, int] = field(default_factory=dict)
    delta: dict[Key, float] = field(default_factory=dict)
    base: dict[Key, float] = field(default_factory=dict)

    def add(self, keys: Sequence[Key], delta: npt.NDArray[Any], base: npt.NDArray[Any]) -> None:
        counts = np.isfinite(delta).sum(axis=0).tolist()
        squares = [np.nansum(np.square(norms, dtype=np.float64), axis=0).tolist() for norms in (delta, base)]
        for key, count, of_delta, of_base in zip(keys, counts, *squares, strict=True):
            self.rows[key] = self.rows.get(key, 0) + count
            self.delta[key] = self.delta.get(key, 0.0) + of_delta
            self.base[key] = self.base.get(key, 0.0) + of_base

    def contributions(self) -> tuple[Contribution, ...]:
        return tuple(
            Contribution(key, self.rows[key], float(np.sqrt(self.delta[key])), float(np.sqrt(self.base[key])))
            for key in self.rows
        )


def totals(trace: Trace, loads: Collection[int]) -> Totals:
    """The contributions of `loads`, and the rows of all requests. Of several workers, each of which has all rows, the
    first one's are counted; their contributions are those of all workers together. Each engine has rows of its own.

    Raises:
        UnreadableFile: a segment is damaged.
    """
    segments = [segment for workers in trace.replicas for segment in workers[0].opened_segments()]
    index = _index(segments)
    wanted = frozenset(loads)
    numbers, counts = np.unique(index.load[index.counted], return_counts=True)
    rows = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    served = {name: facts for segment in segments for name, facts in segment.served.items()}
    contributions = _of_workers(trace, wanted) if trace.parallel else _contributions(segments, index, wanted)
    return Totals(contributions, rows, tuple(_requests(trace, index, served)))


def own_contributions(ledger: Ledger, contributions: Iterable[Contribution]) -> Iterator[Contribution]:
    """The contributions at the modules of a load. A step may record the modules of all adapters, so the rows of a load
    may have zeros at the modules of others."""
    own = {row.key for row in ledger.rows}
    return (contribution for contribution in contributions if contribution.key in own)


def _index(segments: Sequence[Segment]) -> _Index:
    requests: dict[str, int] = {}
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ("request", "position", "phase", "load")}
    for segment in segments:
        step("reading the rows", segment.path)
        read = {name: values(segment.weights, segment.columns[name]) for name in columns}
        numbers = np.array([requests.setdefault(name, len(requests)) for name in segment.requests], np.int32)
        wrong = read["request"][(read["request"] < 0) | (read["request"] >= len(numbers))]
        if wrong.size:
            raise UnreadableFile(
                f"the segment `{segment.path}` is damaged: a row belongs to request {wrong[0]}, but its table has "
                f"{len(numbers)} requests",
                "copy the trace again, or record it again",
            )
        read["request"] = numbers[read["request"]] if len(numbers) else read["request"]
        for name, column in read.items():
            columns[name].append(column)
    request, position, phase, load = (_joined(columns.pop(name)) for name in ("request", "position", "phase", "load"))
    # A stable sort: of equal rows the last one in the trace is the last one here.
    order = np.lexsort((position, load, request))
    counted = np.zeros(len(request), np.bool_)
    # The last of each group is before the first of the next one.
    counted[order] = np.roll(_begins(order, request, load, position), -1)
    loads: dict[int, list[int]] = {}
    firsts = order[_begins(order, request, load)]
    for number, of_request in zip(request[firsts].tolist(), load[firsts].tolist(), strict=True):
        loads.setdefault(number, []).append(of_request)
    return _Index(tuple(requests), request, position, phase == DECODE, load, counted, loads)


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """One column of all segments, in their dtype: a trace has millions of rows."""
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _begins(order: npt.NDArray[np.intp], *columns: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether a row differs in any of the columns from the one before it in this order. The first row does."""
    begins = np.zeros(len(order), np.bool_)
    begins[:1] = True
    for column in columns:
        ordered = column[order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    return begins


def _contributions(
    segments: Sequence[Segment], index: _Index, wanted: frozenset[int]
) -> dict[int, tuple[Contribution, ...]]:
    sums: dict[int, _Sums] = {load: _Sums() for load in wanted}
    begin = 0
    for segment in segments:
        end = begin + segment.count
        if not wanted.isdisjoint(index.load[begin:end].tolist()):
            for start, delta, base in _chunks(segment):
                rows = slice(begin + start, begin + start + len(delta))
                of_load = np.where(index.counted[rows], index.load[rows], -1)
                for load in wanted.intersection(of_load.tolist()):
                    chosen = of_load == load
                    sums[load].add(segment.modules, delta[chosen], base[chosen])
        begin = end
    return {load: of_load.contributions() for load, of_load in sums.items()}


def _of_workers(trace: Trace, wanted: frozenset[int]) -> dict[int, tuple[Contribution, ...]]:
    """The same from the joined rows of several workers. Of a row that was computed twice, the last one counts."""
    sums: dict[int, _Sums] = {}
    for load in wanted:
        if (rows := trace.rows_of(load)) is not None:
            last = np.array(sorted(places(rows).values()), np.intp)
            sums[load] = _Sums()
            sums[load].add(rows.modules, rows.delta_norm[last], rows.base_norm[last])
    return {load: of_load.contributions() for load, of_load in sums.items()}


def _chunks(segment: Segment) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[Any]]]:
    """The first row, ‖delta‖ and ‖base‖ (`[rows, modules]`) of some rows at a time."""
    step("reading the rows", segment.path)
    width = len(segment.modules)
    if not width:
        return
    rows = max(AT_ONCE // width, 1)
    for start in range(0, segment.count, rows):
        stop = min(start + rows, segment.count)
        try:
            delta, base = (
                read_chunk(segment.weights, segment.columns[name], start * width, stop * width).reshape(-1, width)
                for name in ("delta_norm", "base_norm")
            )
        except MemoryError as error:
            raise out_of_memory(f"`{segment.path}`") from error
        yield start, delta, base


def _requests(trace: Trace, index: _Index, served: Mapping[str, Served]) -> Iterator[RequestRows]:
    """The rows of each request, over all loads that it ran with. For requests that an engine does not describe
    (`served`), the prompt and the cached positions are taken from the rows."""
    order = np.lexsort((index.position, index.request))
    request, position, decode = index.request[order], index.position[order], index.decode[order]
    count = len(index.requests)
    distinct = _begins(order, index.request, index.position)
    every, rows, decoded = (
        np.bincount(request[chosen], minlength=count).tolist() for chosen in (slice(None), distinct, distinct & decode)
    )
    first, last = _extent(request, position, count)
    prompt_ends = _extent(request[~decode], position[~decode], count)[1]
    answers_begin = _extent(request[decode], position[decode], count)[0]
    prompts = {record.id: len(record.prompt_ids) for record in trace.requests}
    caching = _has_prefix_cache(trace) and not trace.dropped.rows
    for number, name in enumerate(index.requests):
        if not rows[number]:
            continue
        adjacent = decoded[number] and prompt_ends[number] + 1 == answers_begin[number]
        facts = served.get(name)
        cached = facts.cached if facts is not None else first[number] if caching else 0
        answer = facts.prompt if facts is not None else answers_begin[number] if adjacent else None
        yield RequestRows(
            id=name,
            loads=tuple(index.loads[number]),
            rows=rows[number],
            first=first[number],
            last=last[number],
            cached=cached,
            missing=max(last[number] + 1 - rows[number] - cached, 0),
            decode=decoded[number],
            repeated=every[number] - rows[number],
            prompt=prompts.get(name, answer),
            cached_loads=facts.cached_loads if facts is not None else None,
            preemptions=facts.preemptions if facts is not None else 0,
        )


def _has_prefix_cache(trace: Trace) -> bool:
    return any(worker.process.settings.get("enable_prefix_caching") is True for worker in trace.workers)


def _extent(request: _Numbers, position: _Numbers, count: int) -> tuple[list[int], list[int]]:
    """The smallest and the largest position of each request."""
    first, last = np.full(count, np.iinfo(np.int64).max), np.full(count, -1)
    np.minimum.at(first, request, position)
    np.maximum.at(last, request, position)
    return first.tolist(), last.tolist()
