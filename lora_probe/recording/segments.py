"""One segment of a trace: the rows of some steps, checked before they are believed.

In: a file that a `TraceWriter` wrote, or that somebody says it wrote. Out: a `Segment` from its header and its table,
the values still on disk; `read_rows` reads them as `Rows`, `joined` those of several segments. Columns that nobody
knows are left out. Whatever does not fit together is one `UnreadableFile`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from lora_probe.errors import UnreadableFile, out_of_memory
from lora_probe.files import brief, shown
from lora_probe.files.limits import step
from lora_probe.files.weights import Raw, TensorHeader, WeightsFile, open_weights, read_chunk
from lora_probe.names import Key
from lora_probe.recording.documents import decoded
from lora_probe.recording.rows import COMMON, Rows, concatenate, widened
from lora_probe.recording.sketch import SKETCH

MAX_SEGMENT = 2**35
"""Bytes of one segment. It is closed after the step in which it reaches 4,096 rows: with a step of 8,192 rows, the
norms and the shrink of 560 modules (80 layers) at rank 64 are 1.9 GB; level `tensors` takes ten times as much."""
MAX_JOINED = 2**33
"""Values of all segments of a trace together: 32 GiB as float32, and joining them takes as much again."""

_COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "request": ("I32", ("rows",)),
    "position": ("I32", ("rows",)),
    "phase": ("I8", ("rows",)),
    "load": ("I32", ("rows",)),
    "x_norm": ("F32", ("rows", "modules")),
    "base_norm": ("F32", ("rows", "modules")),
    "delta_norm": ("F32", ("rows", "modules")),
    "output_norm": ("F32", ("rows", "modules")),
    "shrink": ("F32", ("rows", "modules", "r")),
    "sketch": ("F32", ("rows", "modules", "sketch")),
    "gram": ("F32", ("modules", "rank of G", "rank of G")),
}
"""The dtype and the axes of every column. An axis has the same length wherever its name stands."""
_TENSORS = ("x", "base", "delta")
_MODULE_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


class _Table(msgspec.Struct, frozen=True):
    """The metadata `table`: what the numbers of modules and requests stand for."""

    modules: list[Key]
    requests: list[str]
    placed: list[str] = []


@dataclass(frozen=True)
class Segment:
    """The header and the table of one segment. `tensors` are x, base and delta of single modules."""

    weights: WeightsFile
    modules: tuple[Key, ...]
    requests: tuple[str, ...]
    placed: tuple[str, ...]
    columns: dict[str, TensorHeader]
    tensors: dict[str, TensorHeader]

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def count(self) -> int:
        """How many rows it holds."""
        return self.columns["request"].shape[0]

    def width(self, name: str) -> int | None:
        """The length of a column's last axis; None where the segment lacks the column."""
        return self.columns[name].shape[-1] if name in self.columns else None


def open_segment(path: Path) -> Segment:
    """Check the header and the table of a segment.

    Raises:
        UnreadableFile: with the first thing that is wrong.
    """
    weights = open_recorded(path, "a segment")
    if weights.size > MAX_SEGMENT:
        raise _damaged(path, f"it has {weights.size} bytes, more than any segment ({MAX_SEGMENT})")
    table = _table(weights)
    modules = tuple(table.modules)
    if len(set(modules)) < len(modules):
        raise _damaged(path, f"its table names the module `{shown(_twice(modules)[0])}` twice")
    if table.placed and len(table.placed) != len(modules):
        raise _damaged(path, f"its table has {len(table.placed)} digests for {len(modules)} modules")
    columns = _columns(weights, len(modules))
    tensors = _tensors(weights, columns["request"].shape[0], len(modules))
    return Segment(weights, modules, tuple(table.requests), tuple(table.placed), columns, tensors)


def read_rows(segment: Segment) -> Rows:
    """The rows of one segment.

    Raises:
        UnreadableFile: a row belongs to no request of the table, or the file was damaged since it was opened.
    """
    step("reading the rows", segment.path)
    columns = {name: values(segment.weights, header) for name, header in segment.columns.items()}
    numbers, known = columns["request"], len(segment.requests)
    wrong = numbers[(numbers < 0) | (numbers >= known)]
    if wrong.size:
        raise _damaged(segment.path, f"a row belongs to request {wrong[0]}, and its table numbers {known} from 0")
    tensors = {name: values(segment.weights, header) for name, header in segment.tensors.items()}
    return Rows(
        modules=segment.modules, requests=segment.requests, placed=segment.placed, tensors=tensors or None, **columns
    )


def joined(segments: Sequence[Segment]) -> Rows:
    """The rows of one or more segments, with columns for the modules of all.

    Raises:
        UnreadableFile: a segment does not fit the first, all together are too large, or as `read_rows` does.
    """
    keys = tuple(dict.fromkeys(key for segment in segments for key in segment.modules))
    _require_joinable(segments, len(keys))
    *before, last = segments
    # Of several G the last one counts: the others need not be read.
    lean = [replace(s, columns={name: h for name, h in s.columns.items() if name != "gram"}) for s in before]
    try:
        return concatenate([widened(read_rows(segment), keys) for segment in (*lean, last)])
    except MemoryError as error:
        raise out_of_memory(f"the rows of all segments in `{last.path.parent}`") from error


def open_recorded(path: Path, what: str) -> WeightsFile:
    """The header of a safetensors file of a trace. `what` it is meant to be stands in the error."""
    try:
        return open_weights(path)
    except UnreadableFile as error:
        raise UnreadableFile(f"cannot read {what}: {error.message}", error.hint) from error


def values(weights: WeightsFile, header: TensorHeader) -> Raw:
    """The values of a tensor in the dtype and the shape that its header names."""
    try:
        return read_chunk(weights, header, 0, header.parameters).reshape(header.shape)
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
    """The first module that stands in the table a second time."""
    seen: set[Key] = set()
    for key in modules:
        if key in seen:
            return key
        seen.add(key)
    raise ValueError("every module stands in the table once")


def _columns(weights: WeightsFile, modules: int) -> dict[str, TensorHeader]:
    """The columns that are known, each with its dtype and all of the same rows and modules."""
    lengths = {"modules": modules, "sketch": SKETCH}
    found = {}
    for name, (dtype, axes) in _COLUMNS.items():
        header = weights.tensors.get(name)
        if header is None:
            if name in COMMON:
                raise _damaged(weights.path, f"it has no column `{name}`")
            continue
        fits = header.dtype == dtype and len(header.shape) == len(axes)
        # `setdefault`: the first column with an axis says how long that axis is.
        if not fits or any(lengths.setdefault(a, n) != n for a, n in zip(axes, header.shape, strict=True)):
            wanted = ", ".join(str(lengths.get(axis, axis)) for axis in axes)
            is_now = f"{header.dtype} {brief(list(header.shape))}"
            raise _damaged(weights.path, f"the column `{name}` is {is_now} where {dtype} [{wanted}] is meant")
        found[name] = header
    if lengths.get("rank of G", lengths.get("r", 0)) < lengths.get("r", 0):
        raise _damaged(weights.path, f"`gram` is of rank {lengths['rank of G']}, `shrink` of rank {lengths['r']}")
    return found


def _tensors(weights: WeightsFile, rows: int, modules: int) -> dict[str, TensorHeader]:
    """x, base and delta of single modules: `x/3` is `[rows, width]` of module 3."""
    found = {}
    for name, header in weights.tensors.items():
        what, slash, number = name.partition("/")
        if what not in _TENSORS or not slash:
            continue
        if not _MODULE_NUMBER.fullmatch(number) or int(number) >= modules:
            raise _damaged(weights.path, f"`{shown(name)}` belongs to none of its {modules} modules")
        if header.dtype != "F32" or len(header.shape) != 2 or header.shape[0] != rows:
            is_now = f"{header.dtype} {brief(list(header.shape))}"
            raise _damaged(weights.path, f"`{name}` is {is_now} where F32 [{rows}, width] is meant")
        found[name] = header
    return found


def _require_joinable(segments: Sequence[Segment], modules: int) -> None:
    """Columns of the first segment are in all of them and as wide; the joined table can be held."""
    first = segments[0]
    wide: list[str] = [name for name in ("shrink", "sketch") if name in first.columns]
    tensors: dict[tuple[str, Key], int] = {}
    for segment in segments:
        for name in wide:
            if segment.width(name) != first.width(name):
                why = f"`{name}` is missing, or of another width than in {first.path.name}"
                raise _damaged(segment.path, why)
        for name, header in segment.tensors.items():
            what, _, number = name.partition("/")
            known = tensors.setdefault((what, segment.modules[int(number)]), header.shape[1])
            if header.shape[1] != known:
                raise _damaged(segment.path, f"`{name}` is of another width than in an earlier segment")
    # An axis of length 0 must not hide that another one is absurd.
    rows = max(sum(segment.count for segment in segments), 1)
    widths = modules * (4 + sum(first.width(name) or 0 for name in wide)) + sum(tensors.values())
    total = rows * widths + modules * (segments[-1].width("gram") or 0) ** 2
    if total > MAX_JOINED:
        raise UnreadableFile(
            f"the segments in `{first.path.parent}` have {total} values together, more than the "
            f"{MAX_JOINED} that are read at once",
            "record fewer rows, or keep less of each with --keep",
        )
