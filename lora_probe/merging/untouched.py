"""All tensors that no module of the adapter explains: equal to the base's, missing, or added.

In: base and merged checkpoint. Out: `TensorFinding`s. A merged model in another dtype holds the base's values rounded
to it. Only one block of rows is in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lora_probe.base import Checkpoint, StoredTensor
from lora_probe.base.checkpoint import EMBEDDINGS
from lora_probe.files.values import Raw, widen
from lora_probe.ledger import Finding
from lora_probe.merging.report import TensorFinding
from lora_probe.merging.rounding import narrow, through
from lora_probe.precision import FLOATS
from lora_probe.rules.lp7_merging import not_judged
from lora_probe.rules.lp7_untouched import tensor_added, tensor_missing, untouched_changed

CHUNK = 1 << 22
"""Bytes compared at a time."""
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|position_ids)$")
"""Buffers that some versions of transformers save and others recompute."""


def absent_and_added(base: Checkpoint, merged: Checkpoint, names: Mapping[str, str]) -> Iterator[TensorFinding]:
    """Tensors that one checkpoint lacks or has in another shape. `names`: base name -> name in the merged model."""
    for name, tensor in base.tensors.items():
        other = merged.tensors.get(names.get(name, name))
        if other is None and not _BUFFERS.search(name):
            yield TensorFinding(name, tensor_missing("missing from the merged model"))
        elif other is not None and other.shape != tensor.shape:
            text = f"it has shape {list(other.shape)}, the base's {list(tensor.shape)}"
            yield TensorFinding(name, tensor_missing(text))
    expected = set(names.values())
    for name, tensor in merged.tensors.items():
        if name not in expected and not _BUFFERS.search(name) and not _is_copy(tensor, base, merged, names):
            yield TensorFinding(name, tensor_added())


def _is_copy(tensor: StoredTensor, base: Checkpoint, merged: Checkpoint, names: Mapping[str, str]) -> bool:
    """Whether a tensor is a copy of the input embeddings under the name of a module that shares them."""
    shared = [names[name] for name in base.tensors if name.removesuffix(".weight").endswith(EMBEDDINGS)]
    return any(name in merged.tensors and equal(tensor, merged.tensors[name]) for name in shared)


def untouched(base: StoredTensor, merged: StoredTensor) -> Finding | None:
    """A finding if a tensor that the adapter does not change differs from the base's."""
    if base.dtype == merged.dtype:
        buffer = np.empty(CHUNK, np.uint8)
        return _differs(merged, lambda start, stop: base.rows(start, stop, buffer))
    if base.dtype not in FLOATS or merged.dtype not in FLOATS:
        return not_judged(f"it is {base.dtype} in the base and {merged.dtype} in the merged model")
    return _differs(merged, lambda start, stop: narrow(widen(base.rows(start, stop), base.dtype), merged.dtype))


def rounded_on_the_way(base: StoredTensor, merged: StoredTensor) -> str | None:
    """The 16-bit dtype that the base was loaded in, if that explains a tensor of another dtype."""
    for dtype in ("BF16", "F16"):
        if dtype in (base.dtype, merged.dtype) or base.dtype not in FLOATS or merged.dtype not in FLOATS:
            continue

        def wanted(start: int, stop: int, dtype: str = dtype) -> Raw:
            return narrow(through(widen(base.rows(start, stop), base.dtype), dtype), merged.dtype)

        if _differs(merged, wanted) is None:
            return dtype
    return None


def _differs(merged: StoredTensor, wanted: Callable[[int, int], Raw]) -> Finding | None:
    values, distance, norm = 0, 0.0, 0.0
    buffer = np.empty(CHUNK, np.uint8)
    for start, stop in chunks(merged):
        stored: Raw = merged.rows(start, stop, buffer)
        expected: Raw = wanted(start, stop)
        if _same_bits(stored, expected):
            continue
        values += int(np.count_nonzero(stored != expected))
        if merged.dtype in FLOATS:
            actual, reference = widen(stored, merged.dtype), widen(expected, merged.dtype)
            with np.errstate(invalid="ignore", over="ignore"):
                distance += float(np.square(actual - reference, dtype=np.float64).sum())
                norm += float(np.square(reference, dtype=np.float64).sum())
    if not values:
        return None
    relative = (distance / norm) ** 0.5 if norm > 0 else math.nan
    return untouched_changed(values, int(np.prod(merged.shape, dtype=np.int64)), relative)


def _same_bits(one: Raw, other: Raw) -> bool:
    """Whether two arrays of one size and dtype have the same bytes: eight at a time, which takes a quarter of the
    time."""
    bits = np.uint64 if one.nbytes % 8 == 0 else np.uint8
    return np.array_equal(one.reshape(-1).view(bits), other.reshape(-1).view(bits))


def equal(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors are equal bit for bit, dtype and shape included."""
    if (left.shape, left.dtype) != (right.shape, right.dtype):
        return False
    return all(np.array_equal(left.rows(*span), right.rows(*span)) for span in chunks(left))


def chunks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about CHUNK bytes."""
    height, _ = tensor.matrix
    step = max(1, CHUNK * height // max(tensor.size, 1))
    for start in range(0, height, step):
        yield start, min(start + step, height)
