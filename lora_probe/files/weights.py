"""One safetensors file: its bounded header.

In: a path. Out: `TensorHeader`s (name, dtype, shape, byte range), whose values `values.py` reads. Nothing is executed,
and nothing is used before it is checked: the size of the header, every shape, dtype and offset. The format:
https://github.com/huggingface/safetensors. A `.bin` is a `WeightsFile` too (`pickled.py`), whose values torch holds.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_probe.errors import TooLarge, UnreadableFile, out_of_memory
from lora_probe.files.limits import step
from lora_probe.files.untrusted import HEAD, brief, is_text, opened, shown, wrong_file_type
from lora_probe.precision import STORED

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

MAX_TENSORS = 500_000
"""Tensors of one file; an adapter on every expert of a model with 61 layers of 384 experts has 140,000."""
MAX_NAME, MAX_PARTS = 2_000, 64
"""Characters of a tensor's name, and its parts between dots; real names have under 200 and 15."""
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
    """The header of one file of weights. `held(name, start, stop)` returns values of a tensor that are not read by
    position: those of a pickle."""

    path: Path
    size: int
    metadata: dict[str, str]
    tensors: dict[str, TensorHeader]
    held: Callable[[str, int, int], npt.NDArray[Any]] | None = field(default=None, repr=False, compare=False)


def open_weights(path: Path) -> WeightsFile:
    """Read and check the header of `path`.

    Raises:
        UnreadableFile: it is missing, empty, a Git LFS pointer, text, truncated, has overlapping tensors ...
        TooLarge: the name of a tensor is too long.
    """
    step("reading the header", path)
    with opened(path) as (file, size):
        prefix = file.read(8)
        _refuse_wrong_file_type(path, prefix, prefix + file.read(HEAD))
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER or length > size - 8:
            raise UnreadableFile(
                f"`{path}` is not a complete safetensors file: its header claims {length} bytes, the file has {size}",
                "it may be truncated or in another format; copy or download it again",
            )
        file.seek(8)
        raw = file.read(length)
    tensors, metadata = _parsed(path, raw, size - 8 - length)
    _require_whole(path, size, 8 + length, tensors)
    return WeightsFile(path, size, metadata, tensors)


def _refuse_wrong_file_type(path: Path, prefix: bytes, start: bytes) -> None:
    if wrong := wrong_file_type(start, "the weights"):
        raise UnreadableFile(f"`{path}` {wrong[0]}", wrong[1])
    # A header of 640 bytes has a length that begins like a pickle; after the length stands its `{`.
    if start.startswith((b"PK\x03\x04", b"\x80\x02")) and start[8:9] != b"{":
        raise UnreadableFile(
            f"`{path}` is a torch pickle, not a safetensors file",
            f"rename it to {path.with_suffix('.bin').name}, or save it again with safetensors",
        )
    if len(prefix) < 8 or (prefix.isascii() and all(32 <= byte < 127 or byte in (9, 10, 13) for byte in prefix)):
        raise UnreadableFile(
            f"`{path}` is not a safetensors file: it begins with {prefix!r}",
            "a safetensors file begins with the length of its header; is this a text file or a pickle?",
        )


class _Entry(NamedTuple):
    """An entry of the header, unchecked. A header may hold a million of them, and a dict takes twice the memory."""

    dtype: object
    shape: object
    offsets: object


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"the key `{shown(_repeated([name for name, _ in pairs]))}` appears twice")
    if values.keys() == {"dtype", "shape", "data_offsets"}:
        return _Entry(values["dtype"], values["shape"], values["data_offsets"])
    return values


def _repeated(names: list[str]) -> str:
    """The first name that appears more than once."""
    counts = Counter(names)
    return next(name for name in names if counts[name] > 1)


def _parsed(path: Path, raw: bytes, room: int) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """The tensors of the header, each checked by itself, and the metadata. `room`: bytes after the header."""
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with `{`")
        if (count := raw.count(b'"data_offsets"')) > MAX_TENSORS:
            raise ValueError(f"it names {count:,} tensors, more than any model has")
        marks = (raw.count(b"{"), raw.count(b"[") // 2, raw.count(b",") // 8) if len(raw) > _PLAIN_HEADER else (0,)
        # No entry of a tensor is shorter than 40 bytes.
        if max(marks) > len(raw) / 40:
            raise ValueError(f"its {len(raw)} bytes are mostly brackets, not tensors")
        # As text: json.loads also accepts bytes in other encodings, and no safetensors library does.
        header = json.loads(raw.decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object of tensors")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("`__metadata__` is not an object of strings")
        data = 8 + len(raw)
        for name in header:
            require_real_name(path, name)
        return {name: _entry(name, entry, data, room) for name, entry in header.items()}, metadata
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UnreadableFile(
            f"`{path}` has a damaged safetensors header: {why}", "copy or download it again, or save it again"
        ) from error
    except MemoryError as error:
        raise out_of_memory(f"the safetensors header of `{path}`") from error


def require_real_name(path: Path, name: str) -> None:
    """The time to match a name against patterns grows with the square of its length.

    Raises:
        TooLarge: the name is longer than that of any real tensor.
    """
    for count, most, what in ((len(name), MAX_NAME, "characters"), (name.count(".") + 1, MAX_PARTS, "parts")):
        if count > most:
            raise TooLarge(
                f"`{path}`: the name of tensor `{shown(name)}` has {count:,} {what}, more than the limit of {most:,}",
                "rename the tensor: real names have fewer than 200 characters and 15 parts",
            )


def _require_whole(path: Path, size: int, data: int, tensors: dict[str, TensorHeader]) -> None:
    """Every byte belongs to one tensor (`data`: where the values begin)."""
    reached = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != reached:
            word = "overlaps the one before it" if tensor.start < reached else "leaves a gap before it"
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
        raise ValueError(f"`{shown(name)}` is not a name that UTF-8 can encode")
    if not isinstance(entry, _Entry):
        raise ValueError(f"the entry of `{shown(name)}` is not an object")
    dtype, shape, offsets = entry
    if not isinstance(dtype, str) or dtype not in STORED:
        raise ValueError(f"`{shown(name)}` has the unknown dtype {brief(dtype)}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"`{shown(name)}` has the impossible shape {brief(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise ValueError(f"`{shown(name)}` has the impossible offsets {brief(offsets)}")
    start, end = offsets
    width = STORED[dtype].width
    # An axis of length 0 must not hide that the others are impossible: numpy multiplies them all.
    if math.prod(n or 1 for n in shape) * width >= 2**63:
        raise ValueError(f"`{shown(name)}` has the impossible shape {brief(shape)}")
    needed = math.prod(shape) * width
    if start < 0 or end - start != needed:
        held = f"bytes {brief(start)} to {brief(end)}"
        raise ValueError(f"`{shown(name)}` has {held}, and {dtype} {brief(shape)} needs {needed} bytes")
    return TensorHeader(name, dtype, tuple(shape), data + start, data + end)
