"""The values of a file of weights, by positioned reads.

In: a `WeightsFile` and one of its tensors. Out: its values as a numpy array, as stored or as float32; bfloat16 is
widened by hand. Only this file of the two needs numpy: a header can be read without it.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.errors import UnreadableFile, out_of_memory
from lora_probe.files.untrusted import opened, shown
from lora_probe.files.weights import TensorHeader, WeightsFile
from lora_probe.precision import STORED

Bytes = npt.NDArray[np.uint8]
Raw = npt.NDArray[Any]

MAX_VALUES = 2**30
"""Values of one tensor that `read` returns at once: 4 GiB as float32, far more than any lora_A or lora_B has."""
AT_ONCE = 2**22
"""Values of a tensor that are in memory at the same time while it is only looked at."""


class Scratch(threading.local):
    """Memory that each thread reuses for the values of one tensor after another: to allocate it takes as long as to
    read. `stored` is for the bytes of the file; `wide` has arrays of float32 by the name that the caller gives them."""

    def __init__(self) -> None:
        self.stored = np.empty(0, np.uint8)
        self.wide: dict[str, npt.NDArray[np.uint32]] = {}

    def bytes_of(self, size: int) -> Bytes:
        if len(self.stored) < size:
            self.stored = np.empty(size, np.uint8)
        return self.stored

    def widened(self, raw: Raw, name: str) -> npt.NDArray[np.float32]:
        """bfloat16 as float32, valid until the next values of this name."""
        if name not in self.wide or self.wide[name].size < raw.size:
            self.wide[name] = np.empty(raw.size, np.uint32)
        wide = self.wide[name][: raw.size].reshape(raw.shape)
        return np.left_shift(raw, 16, out=wide, dtype=np.uint32).view(np.float32)


def read_half(file: WeightsFile, tensor: TensorHeader, half: str, scratch: Scratch) -> npt.NDArray[np.float32]:
    """As `read`, into memory that is reused: valid until the next `half` is read by this thread."""
    if file.held is not None or tensor.dtype != "BF16" or tensor.parameters > MAX_VALUES:
        return read(file, tensor)
    raw = read_chunk(file, tensor, 0, tensor.parameters, scratch.bytes_of(tensor.end - tensor.start))
    return scratch.widened(raw.reshape(tensor.shape), half)


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
