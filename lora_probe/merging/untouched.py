"""All tensors that no module of the adapter explains: equal to the base's, missing, added.

In: base and merged checkpoint. Out: `TensorFinding`s. A merged model in another dtype holds
the base's values rounded to it. Nothing but a block of rows is in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lora_probe.base import Checkpoint, StoredTensor
from lora_probe.base.checkpoint import EMBEDDINGS
from lora_probe.files.weights import Raw, widen
from lora_probe.ledger import Finding
from lora_probe.merging.report import TensorFinding
from lora_probe.merging.rounding import narrow, through
from lora_probe.precision import FLOATS
from lora_probe.rules.lp7_merging import not_judged
from lora_probe.rules.lp7_untouched import tensor_added, tensor_missing, untouched_changed

CHUNK = 1 << 22
"""Bytes that are compared at a time."""
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|position_ids)$")
"""Buffers that some versions of transformers save and others make anew."""


def absent_and_added(base: Checkpoint, merged: Checkpoint, names: Mapping[str, str]) -> Iterator[TensorFinding]:
    """Tensors of one checkpoint alone. `names`: base name -> name in the merged model."""
    for name, tensor in base.tensors.items():
        other = merged.tensors.get(names.get(name, name))
        if other is None and not _BUFFERS.search(name):
            yield TensorFinding(name, tensor_missing("it is not in the merged model"))
        elif other is not None and other.shape != tensor.shape:
            text = f"it is {list(other.shape)}, the base's is {list(tensor.shape)}"
            yield TensorFinding(name, tensor_missing(text))
    known = set(names.values())
    for name, tensor in merged.tensors.items():
        if name not in known and not _BUFFERS.search(name) and not _is_copy(tensor, base, merged, names):
            yield TensorFinding(name, tensor_added())


def _is_copy(tensor: StoredTensor, base: Checkpoint, merged: Checkpoint, names: Mapping[str, str]) -> bool:
    """Whether a tensor is the input embeddings written again under the name of a module that shares them."""
    shared = [names[name] for name in base.tensors if name.removesuffix(".weight").endswith(EMBEDDINGS)]
    return any(name in merged.tensors and equal(tensor, merged.tensors[name]) for name in shared)


def untouched(base: StoredTensor, merged: StoredTensor) -> Finding | None:
    """Whether a tensor that the adapter does not change is the base's."""
    if base.dtype == merged.dtype:
        buffer = np.empty(CHUNK, np.uint8)
        return _differs(merged, lambda start, stop: base.rows(start, stop, buffer))
    if base.dtype not in FLOATS or merged.dtype not in FLOATS:
        return not_judged(f"it is {base.dtype} in the base and {merged.dtype} in the merged model")
    return _differs(merged, lambda start, stop: narrow(widen(base.rows(start, stop), base.dtype), merged.dtype))


def rounded_on_the_way(base: StoredTensor, merged: StoredTensor) -> str | None:
    """The dtype of 16 bits that the base was loaded in, where that explains a tensor of another dtype."""
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
        there: Raw = merged.rows(start, stop, buffer)
        here: Raw = wanted(start, stop)
        if np.array_equal(there.view(np.uint8), here.view(np.uint8)):
            continue
        values += int(np.count_nonzero(there != here))
        if merged.dtype in FLOATS:
            one, two = widen(there, merged.dtype), widen(here, merged.dtype)
            with np.errstate(invalid="ignore", over="ignore"):
                distance += float(np.square(one - two, dtype=np.float64).sum())
                norm += float(np.square(two, dtype=np.float64).sum())
    if not values:
        return None
    relative = (distance / norm) ** 0.5 if norm > 0 else math.nan
    return untouched_changed(values, int(np.prod(merged.shape, dtype=np.int64)), relative)


def equal(one: StoredTensor, two: StoredTensor) -> bool:
    """Bit for bit, dtype and shape included."""
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    return all(np.array_equal(one.rows(*span), two.rows(*span)) for span in chunks(one))


def chunks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Blocks of rows of about CHUNK bytes."""
    height, _ = tensor.matrix
    step = max(1, CHUNK * height // max(tensor.size, 1))
    for start in range(0, height, step):
        yield start, min(start + step, height)
