"""One safetensors file: its bounded header, and values by positioned reads.

In: a path. Out: `TensorHeader`s (name, dtype, shape, byte range), and on request one tensor's values as a numpy
array, bfloat16 widened by hand to float32. Nothing is executed and nothing is believed before it is checked:
the size of the header, every shape, dtype and offset. The format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.errors import UnreadableFile

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
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes whose values `read` gives."""

LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True)
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
    """The header of one safetensors file."""

    path: Path
    size: int
    metadata: dict[str, str]
    tensors: dict[str, TensorHeader]


def open_weights(path: Path) -> WeightsFile:
    """Read and check the header of `path`.

    Raises:
        UnreadableFile: with what is wrong: missing, empty, a Git LFS pointer, text, truncated, overlapping ...
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableFile(f"`{path}` is not a regular file")
            prefix = file.read(8)
            size = status.st_size
            _refuse_impostors(path, prefix, file.read(len(LFS_MARK) - 8), size)
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER or length > size - 8:
                raise UnreadableFile(
                    f"`{path}` is not a whole safetensors file: its header claims {length} bytes, the file has {size}",
                    "it may be truncated or of another format; copy or download it again",
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise UnreadableFile(f"cannot read `{path}`: {error.strerror or error}") from error
    return _checked(path, size, 8 + length, raw)


def _refuse_impostors(path: Path, prefix: bytes, rest: bytes, size: int) -> None:
    if size == 0:
        raise UnreadableFile(f"`{path}` is empty (0 bytes)", "the save or the download was cut short; repeat it")
    if prefix + rest == LFS_MARK:
        raise UnreadableFile(
            f"`{path}` is a Git LFS pointer, not the weights",
            "run `git lfs pull` in the repository it was cloned from",
        )
    if len(prefix) < 8 or (prefix.isascii() and all(32 <= byte < 127 or byte in (9, 10, 13) for byte in prefix)):
        raise UnreadableFile(
            f"`{path}` is not a safetensors file: it begins with {prefix!r}",
            "a safetensors file begins with the length of its header; is this a text file or a pickle?",
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _checked(path: Path, size: int, data: int, raw: bytes) -> WeightsFile:
    """The header as JSON, with every entry checked against the file (`data`: where the values begin)."""
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise ValueError("`__metadata__` is not an object")
        tensors = {name: _entry(name, entry, data) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"`{path}` has a damaged safetensors header: {error}") from error
    reached = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != reached:
            word = "overlaps its neighbour" if tensor.start < reached else "leaves a hole before it"
            raise UnreadableFile(f"`{path}` has a damaged safetensors header: tensor `{tensor.name}` {word}")
        reached = tensor.end
    if reached != size:
        word = "is truncated" if reached > size else "has bytes that belong to no tensor"
        raise UnreadableFile(
            f"`{path}` {word}: its tensors need {reached} bytes, the file has {size}",
            "copy or download it again",
        )
    return WeightsFile(path, size, {str(k): str(v) for k, v in metadata.items()}, tensors)


def _entry(name: str, entry: object, data: int) -> TensorHeader:
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of `{name}` is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"`{name}` has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"`{name}` has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise ValueError(f"`{name}` has the impossible offsets {offsets!r}")
    start, end = offsets
    if start < 0 or end - start != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError(f"`{name}` has {end - start} bytes where {dtype} {shape} needs another number")
    return TensorHeader(name, dtype, tuple(shape), data + start, data + end)


def read(path: Path, tensor: TensorHeader) -> npt.NDArray[np.float32]:
    """The values of `tensor`, as float32 (float64 is narrowed, bfloat16 and float16 widened exactly).

    Raises:
        UnreadableFile: the dtype is not a float, or the file is shorter than its header said.
    """
    if tensor.dtype not in FLOATS:
        raise UnreadableFile(f"tensor `{tensor.name}` in `{path}` is {tensor.dtype}, not a float")
    raw = read_bytes(path, tensor).view(DTYPES[tensor.dtype][0])
    return widen(raw.reshape(tensor.shape), tensor.dtype)


def widen(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Values as they lie in a file, as float32."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        wide = raw.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return raw.astype(np.float32, copy=False)


def read_bytes(
    path: Path, tensor: TensorHeader, start: int = 0, stop: int | None = None, into: Bytes | None = None
) -> Bytes:
    """The raw bytes of `tensor`, or some of them, by positioned reads (no mapping of the file, no shared position).

    `into` is a buffer to use again: memory that is fresh costs as much as the reading.
    """
    size = (tensor.end - tensor.start if stop is None else stop) - start
    buffer = np.empty(size, np.uint8) if into is None or len(into) < size else into[:size]
    view, done = buffer.data, 0
    try:
        with path.open("rb", buffering=0) as file:
            # One call stops at 2 GiB.
            while got := os.preadv(file.fileno(), [view[done:]], tensor.start + start + done):
                done += got
    except OSError as error:
        raise UnreadableFile(f"cannot read `{path}`: {error.strerror or error}") from error
    if done != len(buffer):
        raise UnreadableFile(f"`{path}` ends inside tensor `{tensor.name}`; was it changed while it was read?")
    return buffer


def sha256(path: Path) -> str:
    """The digest of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
