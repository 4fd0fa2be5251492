"""One safetensors file: its bounded header, and values by positioned reads.

In: a path. Out: `TensorHeader`s (name, dtype, shape, byte range), and on request one tensor's values as a numpy
array, bfloat16 widened by hand to float32. Nothing is executed, and nothing is used before it is checked: the size of
the header, every shape, dtype and offset. The format: https://github.com/huggingface/safetensors. A `.bin` is a
`WeightsFile` too (`pickled.py`), whose values torch holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lora_probe.errors import TooLarge, UnreadableFile, out_of_memory
from lora_probe.files.limits import step
from lora_probe.files.untrusted import HEAD, brief, is_text, opened, shown, wrong_file_type
from lora_probe.precision import STORED

MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

Bytes = npt.NDArray[np.uint8]
Raw = npt.NDArray[Any]

MAX_TENSORS = 500_000
"""Tensors of one file; an adapter on every expert of a model with 61 layers of 384 experts has 140,000."""
MAX_NAME, MAX_PARTS = 2_000, 64
"""Characters of a tensor's name, and its parts between dots; real names have under 200 and 15."""
MAX_VALUES = 2**30
"""Values of one tensor that `read` returns at once: 4 GiB as float32, far more than any lora_A or lora_B has."""
AT_ONCE = 2**22
"""Values of a tensor that are in memory at the same time while it is only looked at."""
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
    held: Callable[[str, int, int], Raw] | None = field(default=None, repr=False, compare=False)


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


def read(file: WeightsFile, tensor: TensorHeader) -> npt.NDArray[np.float32]:
    """The values of `tensor`, as float32: as PEFT and vLLM convert them, which accept every dtype. float64 is narrowed.

    Raises:
        UnreadableFile: the tensor is too large, or the file has become shorter.
        TooLarge: there is not enough memory for it.
    """
    where = f"tensor `{shown(tensor.name)}` in `{file.path}`"
    if tensor.parameters > MAX_VALUES:
        raise UnreadableFile(
            f"{where} has {tensor.parameters:,} values, more than any lora_A or lora_B has",
            "the file may be damaged, or a whole model",
        )
    try:
        raw = read_chunk(file, tensor, 0, tensor.parameters).reshape(tensor.shape)
        # The caller may change the values, but those that torch holds must not change.
        return widen(raw if file.held is None else raw.copy(), tensor.dtype)
    except MemoryError as error:
        raise out_of_memory(f"{where}, which has {tensor.parameters:,} values,") from error


def read_chunk(file: WeightsFile, tensor: TensorHeader, start: int, stop: int, into: Bytes | None = None) -> Raw:
    """Values of `tensor` as they are in the file, as one row; written into `into` if that is large enough."""
    if file.held is not None:
        return file.held(tensor.name, start, stop)
    dtype = STORED[tensor.dtype]
    return read_bytes(file.path, tensor, start * dtype.width, stop * dtype.width, into).view(dtype.storage)


def digest_of_values(dtype: str, shape: Sequence[int], read: Callable[[int, int], Raw]) -> str:
    """A digest of a tensor's dtype, its shape and its values as stored. `read` returns those from `start` to `stop`."""
    digest, count = hashlib.sha256(f"{dtype} {tuple(shape)}".encode()), math.prod(shape)
    for start in range(0, count, AT_ONCE):
        digest.update(np.ascontiguousarray(read(start, min(start + AT_ONCE, count))).data)
    return digest.hexdigest()


def widen(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values as they are in a file, as float32. A float64 beyond its range becomes infinite."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype in _EIGHT_BITS:
        values: npt.NDArray[np.float32] = _EIGHT_BITS[dtype][raw]
        return values
    with np.errstate(over="ignore"):
        narrowed: npt.NDArray[np.float32] = raw.astype(np.float32, copy=False)
    return narrowed


def _eight_bits() -> dict[str, npt.NDArray[np.float32]]:
    """The 256 values of each 8-bit float (OCP "8-bit Floating Point Specification" and "Microscaling Formats")."""
    codes = np.arange(256)
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 7), codes >> 3 & 15, codes & 7
    e4m3 = sign * np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    e4m3[[0x7F, 0xFF]] = np.nan
    # A float8_e5m2 is the upper half of a float16.
    e5m2 = (codes << 8).astype(np.uint16).view(np.float16)
    e8m0 = np.where(codes == 255, np.nan, 2.0 ** (codes - 127.0))
    return {
        name: values.astype(np.float32) for name, values in (("F8_E4M3", e4m3), ("F8_E5M2", e5m2), ("F8_E8M0", e8m0))
    }


_EIGHT_BITS = _eight_bits()


def read_bytes(
    path: Path, tensor: TensorHeader, start: int = 0, stop: int | None = None, into: Bytes | None = None
) -> Bytes:
    """The raw bytes of `tensor`, or some of them, by positioned reads (no mapping of the file, no shared position).

    `into` is a buffer to reuse: allocating memory takes as long as reading.
    """
    size = (tensor.end - tensor.start if stop is None else stop) - start
    buffer = np.empty(size, np.uint8) if into is None or len(into) < size else into[:size]
    view, done = buffer.data, 0
    with opened(path) as (file, _):
        # One call stops at 2 GiB.
        while got := os.preadv(file.fileno(), [view[done:]], tensor.start + start + done):
            done += got
    if done != len(buffer):
        raise UnreadableFile(
            f"`{path}` ends inside tensor `{shown(tensor.name)}`; it may have changed while it was read"
        )
    return buffer
