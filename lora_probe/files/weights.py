"""One safetensors file: its bounded header, and values by positioned reads.

In: a path. Out: `TensorHeader`s (name, dtype, shape, byte range), and on request one tensor's values as a numpy
array, bfloat16 widened by hand to float32. Nothing is executed and nothing is believed before it is checked:
the size of the header, every shape, dtype and offset. The format: https://github.com/huggingface/safetensors.
A `.bin` is such a `WeightsFile` as well (`pickled.py`), with values that torch holds.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_probe.errors import TooLarge, UnreadableFile, out_of_memory
from lora_probe.files.limits import step
from lora_probe.files.untrusted import brief, impostor, is_text, opened, shown

MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("<f8", 8),
    "F32": ("<f4", 4),
    "F16": ("<f2", 2),
    "BF16": ("<u2", 2),
    "I64": ("<i8", 8),
    "I32": ("<i4", 4),
    "I16": ("<i2", 2),
    "I8": ("<i1", 1),
    "U64": ("<u8", 8),
    "U32": ("<u4", 4),
    "U16": ("<u2", 2),
    "U8": ("<u1", 1),
    "BOOL": ("|b1", 1),
    "F8_E4M3": ("<u1", 1),
    "F8_E5M2": ("<u1", 1),
    "F8_E8M0": ("<u1", 1),
}
"""Name in the file: numpy storage type, bytes a value. BF16 and F8 are raw bits to numpy."""

Bytes = npt.NDArray[np.uint8]
Raw = npt.NDArray[Any]
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes whose values `read` gives."""

MAX_TENSORS = 500_000
"""Tensors of one file; an adapter on every expert of a model with 61 layers of 384 experts has 140,000."""
MAX_NAME, MAX_PARTS = 2_000, 64
"""Characters of a tensor's name, and its parts between dots; real names have under 200 and 15."""
MAX_VALUES = 2**30
"""Values of one tensor that `read` gives at once: 4 GiB as float32, and far more than any half of a pair has."""
_PLAIN_HEADER = 10_000_000
"""Bytes of a header below which its brackets need not be counted."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file: everything but its values. `start` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightsFile:
    """The header of one file of weights. `held(name, start, stop)` gives values of a tensor that are not read by
    position: those of a pickle."""

    path: Path
    size: int
    metadata: dict[str, str]
    tensors: dict[str, TensorHeader]
    held: Callable[[str, int, int], Raw] | None = field(default=None, repr=False, compare=False)


def open_weights(path: Path) -> WeightsFile:
    """Read and check the header of `path`.

    Raises:
        UnreadableFile: with what is wrong: missing, empty, a Git LFS pointer, text, truncated, overlapping ...
        TooLarge: a tensor has a name that is longer than any.
    """
    step("reading the header", path)
    with opened(path) as (file, size):
        prefix = file.read(8)
        _refuse_impostors(path, prefix, prefix + file.read(64))
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER or length > size - 8:
            raise UnreadableFile(
                f"`{path}` is not a whole safetensors file: its header claims {length} bytes, the file has {size}",
                "it may be truncated or of another format; copy or download it again",
            )
        file.seek(8)
        raw = file.read(length)
    tensors, metadata = _parsed(path, raw, size - 8 - length)
    _require_whole(path, size, 8 + length, tensors)
    return WeightsFile(path, size, metadata, tensors)


def _refuse_impostors(path: Path, prefix: bytes, start: bytes) -> None:
    if wrong := impostor(start, "the weights"):
        raise UnreadableFile(f"`{path}` {wrong[0]}", wrong[1])
    # A header of 640 bytes has a length that begins like a pickle; after the length stands its `{`.
    if start.startswith((b"PK\x03\x04", b"\x80\x02")) and start[8:9] != b"{":
        raise UnreadableFile(
            f"`{path}` is a pickle of torch, not a safetensors file",
            f"rename it to {path.with_suffix('.bin').name}, or save it again with safetensors",
        )
    if len(prefix) < 8 or (prefix.isascii() and all(32 <= byte < 127 or byte in (9, 10, 13) for byte in prefix)):
        raise UnreadableFile(
            f"`{path}` is not a safetensors file: it begins with {prefix!r}",
            "a safetensors file begins with the length of its header; is this a text file or a pickle?",
        )


class _Entry(NamedTuple):
    """An entry of the header as it stands there: a header may hold a million, and a dict takes twice the memory."""

    dtype: object
    shape: object
    offsets: object


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"the key `{shown(_repeated([name for name, _ in pairs]))}` stands twice")
    if found.keys() == {"dtype", "shape", "data_offsets"}:
        return _Entry(found["dtype"], found["shape"], found["data_offsets"])
    return found


def _repeated(names: list[str]) -> str:
    """The first of the names that stand there more than once."""
    counts = Counter(names)
    return next(name for name in names if counts[name] > 1)


def _parsed(path: Path, raw: bytes, room: int) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """The tensors of the header, each checked by itself, and the metadata. `room`: bytes behind the header."""
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with `{`")
        if (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
            raise ValueError(f"it names {count:,} tensors, more than any model has")
        marks = (raw.count(b"{"), raw.count(b"[") // 2, raw.count(b",") // 8) if len(raw) > _PLAIN_HEADER else (0,)
        # No entry of a tensor is shorter than 40 bytes.
        if max(marks) > len(raw) / 40:
            raise ValueError(f"its {len(raw)} bytes are brackets rather than tensors")
        # As text: json.loads takes bytes of other encodings too, and no safetensors library does.
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object of tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("`__metadata__` is not an object of texts")
        data = 8 + len(raw)
        for name in header:
            require_real_name(path, name)
        return {name: _entry(name, entry, data, room) for name, entry in header.items()}, metadata
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UnreadableFile(
            f"`{path}` has a damaged safetensors header: {why}", "copy or download it again, or save it again"
        ) from error
    except MemoryError as error:
        raise out_of_memory(f"the safetensors header of `{path}`") from error


def require_real_name(path: Path, name: str) -> None:
    """Names are compared with patterns, part by part and end by end, and much of that grows with the square.

    Raises:
        TooLarge: no tensor has a name of this length.
    """
    for found, most, what in ((len(name), MAX_NAME, "characters"), (name.count(".") + 1, MAX_PARTS, "parts")):
        if found > most:
            raise TooLarge(
                f"`{path}`: the name of tensor `{shown(name)}` has {found:,} {what}, more than the {most:,} of a name "
                "that is judged",
                "rename the tensor: real names have under 200 characters and 15 parts",
            )


def _require_whole(path: Path, size: int, data: int, tensors: dict[str, TensorHeader]) -> None:
    """Every byte belongs to one tensor (`data`: where the values begin)."""
    reached = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != reached:
            word = "overlaps its neighbour" if tensor.start < reached else "leaves a hole before it"
            raise UnreadableFile(
                f"`{path}` has a damaged safetensors header: tensor `{shown(tensor.name)}` {word}",
                "copy or download it again, or save it again",
            )
        reached = tensor.end
    if reached != size:
        word = "is truncated" if reached > size else "has bytes that belong to no tensor"
        raise UnreadableFile(
            f"`{path}` {word}: its tensors need {reached} bytes, the file has {size}",
            "copy or download it again",
        )


def _entry(name: str, entry: object, data: int, room: int) -> TensorHeader:
    if isinstance(entry, dict):
        entry = _Entry(entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
    if not is_text(name):
        raise ValueError(f"`{shown(name)}` is no name that can be written in UTF-8")
    if not isinstance(entry, _Entry):
        raise ValueError(f"the entry of `{shown(name)}` is not an object")
    dtype, shape, offsets = entry
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"`{shown(name)}` has the unknown dtype {brief(dtype)}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"`{shown(name)}` has the impossible shape {brief(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise ValueError(f"`{shown(name)}` has the impossible offsets {brief(offsets)}")
    start, end = offsets
    width = DTYPES[dtype][1]
    # An axis of length 0 must not hide that the others are impossible: numpy multiplies them all.
    if math.prod(n or 1 for n in shape) * width >= 2**63:
        raise ValueError(f"`{shown(name)}` has the impossible shape {brief(shape)}")
    if start < 0 or end - start != math.prod(shape) * width:
        raise ValueError(
            f"`{shown(name)}` has {brief(end - start)} bytes where {dtype} {brief(shape)} needs another number"
        )
    return TensorHeader(name, dtype, tuple(shape), data + start, data + end)


def read(file: WeightsFile, tensor: TensorHeader) -> npt.NDArray[np.float32]:
    """The values of `tensor`, as float32 (float64 is narrowed, bfloat16 and float16 widened exactly).

    Raises:
        UnreadableFile: the dtype is not a float, the tensor is absurdly large, or the file is shorter than it was.
        TooLarge: there is no memory for it.
    """
    where = f"tensor `{shown(tensor.name)}` in `{file.path}`"
    if tensor.dtype not in FLOATS:
        raise UnreadableFile(f"{where} is {tensor.dtype}, not a float")
    if tensor.parameters > MAX_VALUES:
        raise UnreadableFile(
            f"{where} has {tensor.parameters:,} values, more than any half of a LoRA pair",
            "is the file damaged, or a whole model?",
        )
    try:
        raw = stretch(file, tensor, 0, tensor.parameters).reshape(tensor.shape)
        # What is held must stay as it is, whatever is done to the values.
        return widen(raw if file.held is None else raw.copy(), tensor.dtype)
    except MemoryError as error:
        raise out_of_memory(f"{where}, which has {tensor.parameters:,} values,") from error


def stretch(file: WeightsFile, tensor: TensorHeader, start: int, stop: int, into: Bytes | None = None) -> Raw:
    """Values of `tensor` as they lie in the file, as one row; in `into` if that is large enough and of use."""
    if file.held is not None:
        return file.held(tensor.name, start, stop)
    storage, width = DTYPES[tensor.dtype]
    return read_bytes(file.path, tensor, start * width, stop * width, into).view(storage)


def widen(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values as they lie in a file, as float32. A float64 beyond its range becomes infinite."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    with np.errstate(over="ignore"):
        narrowed: npt.NDArray[np.float32] = raw.astype(np.float32, copy=False)
    return narrowed


def read_bytes(
    path: Path, tensor: TensorHeader, start: int = 0, stop: int | None = None, into: Bytes | None = None
) -> Bytes:
    """The raw bytes of `tensor`, or some of them, by positioned reads (no mapping of the file, no shared position).

    `into` is a buffer to use again: memory that is fresh costs as much as the reading.
    """
    size = (tensor.end - tensor.start if stop is None else stop) - start
    buffer = np.empty(size, np.uint8) if into is None or len(into) < size else into[:size]
    view, done = buffer.data, 0
    with opened(path) as (file, _):
        # One call stops at 2 GiB.
        while got := os.preadv(file.fileno(), [view[done:]], tensor.start + start + done):
            done += got
    if done != len(buffer):
        raise UnreadableFile(f"`{path}` ends inside tensor `{shown(tensor.name)}`; was it changed while it was read?")
    return buffer
