"""One segment of a trace: the rows of some steps as they are on disk. They are checked before they are used.

In: `Rows` to write; or an untrusted file that a `TraceWriter` should have written. Out: the tensors and the metadata of
a segment; a `Segment` from a file's header and its table, whose values stay on disk. `read_rows` reads them as `Rows`,
`joined` reads those of several segments. Unknown columns are ignored. Anything inconsistent is one `UnreadableFile`.

A segment has the rows of one load, with columns for the modules of that load, or rows without a load. The weights of
its loads are in the tensor `grams`, `[loads, modules, r, r]`, and in a digest for each module in each of the table's
`loads`. Only the first segment of a load has its G. The later ones have its digests, so a reader knows that it is still
the same.

Older segments have the rows of several loads, and before that one `gram`, `[modules, r, r]`, and one list of digests,
`placed`, both of the load that ran last. All layouts are schema 1, and the names differ on purpose: an older reader
ignores the new names and uses the norms as a bound, which is right for every row. Under the old names it would use one
load's G for all rows, and its results could be wrong by any factor. This reader uses an old `gram` for all loads with
rows in the segment: the old writer closed a segment when the digests changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lora_probe.errors import UnreadableFile, out_of_memory
from lora_probe.files import brief, shown
from lora_probe.files.limits import step
from lora_probe.files.values import Raw, read_chunk
from lora_probe.files.weights import TensorHeader, WeightsFile, open_weights
from lora_probe.names import Key
from lora_probe.recording.documents import decoded
from lora_probe.recording.placed import Placed, joined_placed
from lora_probe.recording.records import SCHEMA, Served
from lora_probe.recording.rows import ARRAYS, COLUMNS, REQUIRED, TABLES, Rows, as_wide
from lora_probe.recording.sketch import SKETCH
from lora_probe.recording.stacking import stacked

AT_ONCE = 1024
"""Rows that are read at the same time, beside those that are joined already."""
MAX_SEGMENT = 2**35
"""Bytes of one segment. It is closed after the step in which it reaches 4,096 rows: with a step of 8,192 rows, the
norms and the shrink of 560 modules (80 layers) at rank 64 are 1.9 GB; level `tensors` takes ten times as much."""
MAX_JOINED = 2**33
"""Values of all segments of a trace together: 32 GiB as float32, and joining them takes as much again."""

_TABLE_NAME = re.compile(rf"(?P<column>{'|'.join(TABLES)})/(?P<module>0|[1-9][0-9]{{0,8}})")
"""The name of the table of a single module in a segment: `x/3` for module 3."""
_GRAMS = {
    "grams": ("F32", ("loads", "modules", "rank of G", "rank of G")),
    "gram": ("F32", ("modules", "rank of G", "rank of G")),
}
"""G of all loads of a segment, and the older layout: G of the last load."""


class _LoadTable(msgspec.Struct, frozen=True):
    """A load with rows in the segment, and the digest of its weights at each module."""

    load: int
    placed: list[str] = []


class _Table(msgspec.Struct, frozen=True):
    """The metadata `table`: the names behind the numbers of modules, requests and loads. Older segments have
    `placed`. `served` has an entry for each of `requests`, or is absent."""

    modules: list[Key]
    requests: list[str]
    loads: list[_LoadTable] | None = None
    placed: list[str] = []
    served: list[Served | None] = []


@dataclass(frozen=True)
class Segment:
    """The header and the table of one segment. `tables` are x, base and delta of single modules, by column and module;
    `digests` has a list for each of `loads`."""

    weights: WeightsFile
    modules: tuple[Key, ...]
    requests: tuple[str, ...]
    served: dict[str, Served]
    loads: tuple[int, ...]
    digests: tuple[tuple[str, ...], ...]
    columns: dict[str, TensorHeader]
    tables: dict[tuple[str, Key], TensorHeader]
    grams: TensorHeader | None

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.columns["request"].shape[0]

    def width(self, name: str) -> int | None:
        """The length of a column's last axis; None if the segment does not have the column."""
        return self.columns[name].shape[-1] if name in self.columns else None


def contents(rows: Rows) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a segment with `rows`."""
    columns = {name: getattr(rows, name) for name in ARRAYS}
    tensors = {name: np.ascontiguousarray(column) for name, column in columns.items() if column is not None}
    numbers = {key: number for number, key in enumerate(rows.modules)}
    for name in TABLES:
        tensors |= {f"{name}/{numbers[key]}": values for key, values in (getattr(rows, name) or {}).items()}
    grams = [placed.gram for placed in rows.placed.values() if placed.gram is not None]
    if grams and len(grams) == len(rows.placed):
        tensors["grams"] = np.stack(grams)
    loads = [_LoadTable(load, list(placed.digests)) for load, placed in rows.placed.items()]
    served = [rows.served.get(request) for request in rows.requests] if rows.served else []
    table = msgspec.json.encode(_Table(list(rows.modules), list(rows.requests), loads, served=served)).decode()
    return tensors, {"schema": str(SCHEMA), "table": table}


def open_segment(path: Path) -> Segment:
    """Check the header and the table of a segment.

    Raises:
        UnreadableFile: with the first problem.
    """
    weights = open_recorded(path, "a segment")
    if weights.size > MAX_SEGMENT:
        raise _damaged(path, f"it has {weights.size} bytes, more than the limit of {MAX_SEGMENT}")
    table = _table(weights)
    modules = tuple(table.modules)
    if len(set(modules)) < len(modules):
        raise _damaged(path, f"its table contains the module `{shown(_twice(modules)[0])}` twice")
    if table.served and len(table.served) != len(table.requests):
        raise _damaged(path, f"its table describes {len(table.served)} of {len(table.requests)} requests")
    served = {name: facts for name, facts in zip(table.requests, table.served, strict=False) if facts is not None}
    columns, grams = _columns(weights, len(modules), len(table.loads or ()))
    loads, digests = _loads(weights, table, columns["load"])
    tables = _tables(weights, columns["request"].shape[0], modules)
    return Segment(weights, modules, tuple(table.requests), served, loads, digests, columns, tables, grams)


def read_rows(segment: Segment) -> Rows:
    """The rows of one segment.

    Raises:
        UnreadableFile: the request of a row is not in the table, or the file has changed since it was opened.
    """
    return replace(_read_columns(segment), placed=_read_placed(segment))


def _read_columns(segment: Segment, begin: int = 0, end: int | None = None) -> Rows:
    """Some rows of one segment, without the weights of their loads."""
    step("reading the rows", segment.path)
    end = segment.count if end is None else end
    columns: dict[str, Any] = {
        name: values(segment.weights, header, begin, end) for name, header in segment.columns.items()
    }
    numbers, count = columns["request"], len(segment.requests)
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if wrong.size:
        raise _damaged(segment.path, f"a row belongs to request {wrong[0]}, but its table has {count} requests")
    for (name, key), header in segment.tables.items():
        columns.setdefault(name, {})[key] = values(segment.weights, header, begin, end)
    return Rows(modules=segment.modules, requests=segment.requests, served=segment.served, **columns)


def _pieces(segments: Sequence[Segment]) -> Iterator[Rows]:
    """The rows of segments, some thousand at a time."""
    for segment in segments:
        for begin in range(0, segment.count, AT_ONCE) or (0,):
            yield _read_columns(segment, begin, min(begin + AT_ONCE, segment.count))


def _read_placed(segment: Segment) -> dict[int, Placed]:
    grams: Any = [None] * len(segment.loads)
    if segment.grams is not None:
        read = values(segment.weights, segment.grams)
        # In an older segment one G counts for all loads.
        grams = read if read.ndim == len(_GRAMS["grams"][1]) else [read] * len(segment.loads)
    return {load: Placed(*of_load) for load, *of_load in zip(segment.loads, segment.digests, grams, strict=True)}


def _placed_parts(segments: Sequence[Segment]) -> Iterator[tuple[tuple[Key, ...], Mapping[int, Placed]]]:
    """The weights of the loads of each segment, one segment at a time. Most segments repeat those of an earlier one
    and are not read again."""
    seen = set()
    for segment in segments:
        what = segment.modules, segment.loads, segment.digests, segment.grams is None
        if what not in seen:
            seen.add(what)
            yield segment.modules, _read_placed(segment)


def joined(segments: Sequence[Segment]) -> Rows:
    """The rows of one or more segments, with columns for the modules of all, at the widest rank of all.

    Raises:
        UnreadableFile: all together are too large, or as in `read_rows`.
    """
    keys = tuple(dict.fromkeys(key for segment in segments for key in segment.modules))
    _require_joinable(segments, len(keys))
    try:
        widths = {
            name: max((segment.width(name) or 0 for segment in segments if name in segment.columns), default=0)
            for name in ARRAYS
            if any(name in segment.columns for segment in segments)
        }
        count = sum(segment.count for segment in segments)
        rows = stacked(_pieces(segments), keys, count, widths)
        return replace(rows, placed=as_wide(joined_placed(_placed_parts(segments), keys), rows.shrink))
    except MemoryError as error:
        raise out_of_memory(f"the rows of all segments in `{segments[-1].path.parent}`") from error


def open_recorded(path: Path, what: str) -> WeightsFile:
    """The header of a safetensors file of a trace. `what` it should be appears in the error."""
    try:
        return open_weights(path)
    except UnreadableFile as error:
        raise UnreadableFile(f"cannot read {what}: {error.message}", error.hint) from error


def values(weights: WeightsFile, header: TensorHeader, begin: int = 0, end: int | None = None) -> Raw:
    """The values of a tensor in the dtype and the shape of its header; or some of its first axis."""
    shape = (header.shape[0] if end is None else end) - begin, *header.shape[1:]
    each = math.prod(header.shape[1:])
    try:
        return read_chunk(weights, header, begin * each, (begin + shape[0]) * each).reshape(shape)
    except MemoryError as error:
        raise out_of_memory(f"`{weights.path}`") from error


def _damaged(path: Path, what: str) -> UnreadableFile:
    return UnreadableFile(f"the segment `{path}` is damaged: {what}", "copy the trace again, or record it again")


def _table(weights: WeightsFile) -> _Table:
    text = weights.metadata.get("table")
    if text is None:
        raise _damaged(weights.path, "its metadata has no `table`")
    try:
        return decoded(text, msgspec.json.Decoder(_Table))
    except ValueError as error:
        raise _damaged(weights.path, f"its table cannot be read: {error}") from error


def _twice(modules: tuple[Key, ...]) -> Key:
    """The first module that is in the table twice."""
    seen: set[Key] = set()
    for key in modules:
        if key in seen:
            return key
        seen.add(key)
    raise ValueError("every module is in the table once")


def _columns(weights: WeightsFile, modules: int, loads: int) -> tuple[dict[str, TensorHeader], TensorHeader | None]:
    """The known columns, each with the right dtype and all with the same rows and modules; and G, if there is one."""
    lengths = {"modules": modules, "loads": loads, "sketch": SKETCH}
    wanted = {name: (COLUMNS[name].dtype, COLUMNS[name].axes) for name in ARRAYS} | _GRAMS
    headers = {}
    for name, (dtype, axes) in wanted.items():
        header = weights.tensors.get(name)
        if header is None:
            if name in REQUIRED:
                raise _damaged(weights.path, f"it has no column `{name}`")
            continue
        fits = header.dtype == dtype and len(header.shape) == len(axes)
        # `setdefault`: the first column with an axis sets the length of that axis.
        if not fits or any(lengths.setdefault(a, n) != n for a, n in zip(axes, header.shape, strict=True)):
            shape = ", ".join(str(lengths.get(axis, axis)) for axis in axes)
            is_now = f"{header.dtype} {brief(list(header.shape))}"
            raise _damaged(weights.path, f"column `{name}` is {is_now}, expected {dtype} [{shape}]")
        headers[name] = header
    if lengths.get("rank of G", lengths.get("r", 0)) < lengths.get("r", 0):
        raise _damaged(weights.path, f"G has rank {lengths['rank of G']}, but `shrink` has rank {lengths['r']}")
    old, new = headers.pop("gram", None), headers.pop("grams", None)
    return headers, new or old


def _loads(
    weights: WeightsFile, table: _Table, column: TensorHeader
) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
    """The loads of a segment with the digests of each. An older segment does not list them, so they are taken from its
    rows."""
    modules = len(table.modules)
    if table.loads is not None:
        loads = tuple(of_load.load for of_load in table.loads)
        lists = [of_load.placed for of_load in table.loads]
        if len(set(loads)) < len(loads) or min(loads, default=0) < 0:
            raise _damaged(weights.path, "its table contains a load twice, or one with a negative number")
    else:
        loads = tuple(np.unique(values(weights, column)).tolist())
        loads = tuple(load for load in loads if load >= 0)
        lists = [table.placed] * len(loads)
    for digests in (*lists, table.placed):
        if digests and len(digests) != modules:
            raise _damaged(weights.path, f"its table has {len(digests)} digests for {modules} modules")
    none = ("",) * modules
    return loads, tuple(tuple(digests) or none for digests in lists)


def _tables(weights: WeightsFile, rows: int, modules: tuple[Key, ...]) -> dict[tuple[str, Key], TensorHeader]:
    """x, base and delta of single modules: `[rows, width]` each."""
    starts = tuple(f"{name}/" for name in TABLES)
    tables = {}
    for text, header in weights.tensors.items():
        if not text.startswith(starts):
            continue
        name = _TABLE_NAME.fullmatch(text)
        if name is None or int(name["module"]) >= len(modules):
            raise _damaged(weights.path, f"`{shown(text)}` does not belong to any of its {len(modules)} modules")
        if header.dtype != "F32" or len(header.shape) != 2 or header.shape[0] != rows:
            is_now = f"{header.dtype} {brief(list(header.shape))}"
            raise _damaged(weights.path, f"`{text}` is {is_now}, expected F32 [{rows}, width]")
        tables[name["column"], modules[int(name["module"])]] = header
    return tables


def _require_joinable(segments: Sequence[Segment], modules: int) -> None:
    """The joined rows fit into memory, at the widest rank of all segments, and each table has one width.

    Segments may have different ranks, modules and levels: each adapter has its own rank, and the level can be changed
    while a server runs.
    """
    wide = [name for name in ARRAYS if name not in REQUIRED]
    widest = dict.fromkeys(wide, 0)
    widths: dict[tuple[str, Key], int] = {}
    rank, loads = 0, {load for segment in segments for load in segment.loads}
    for segment in segments:
        widest |= {name: max(widest[name], segment.width(name) or 0) for name in wide}
        for at, header in segment.tables.items():
            if header.shape[1] != widths.setdefault(at, header.shape[1]):
                raise _damaged(segment.path, f"the width of `{shown(header.name)}` differs from an earlier segment")
        if segment.grams is not None:
            rank = max(rank, segment.grams.shape[-1])
    if rank:
        # G is padded to the width of `shrink`.
        rank = max(rank, widest["shrink"])
    # An axis of length 0 must not hide the absurd length of another.
    rows = max(sum(segment.count for segment in segments), 1)
    columns = modules * (4 + sum(widest.values())) + sum(widths.values())
    total = rows * columns + max(len(loads), 1) * modules * rank**2
    if total > MAX_JOINED:
        raise UnreadableFile(
            f"the segments in `{segments[0].path.parent}` have {total} values together, more than the limit of"
            f" {MAX_JOINED}",
            "record fewer rows, or keep less of each with --keep",
        )
