"""All tensors that no module of the adapter explains: equal to the base's, missing, added.

In: base and merged checkpoint. Out: `TensorFinding`s. A merged model in another dtype holds
the base's values rounded to it. Nothing but a block of rows is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.checkpoint import Checkpoint, StoredTensor
from lora_probe.ledger import Finding
from lora_probe.merging.report import TensorFinding
from lora_probe.rounding import UNIT, Raw, narrow
from lora_probe.rules.merging import tensor_added, tensor_missing, untouched_changed
from lora_probe.weights import TensorHeader, widen

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
    known = {names.get(name, name) for name in base.tensors}
    for name in merged.tensors:
        if name not in known and not _BUFFERS.search(name):
            yield TensorFinding(name, tensor_added())


def untouched(base: StoredTensor, merged: StoredTensor, own: TensorHeader | None, adapter: Adapter) -> Finding | None:
    """Whether a tensor that the adapter does not change is the base's; `own`: the adapter carries the base's values."""
    if own is not None:
        values = adapter.values(own).reshape(base.matrix)
        return _differs(merged, lambda start, stop: narrow(values[start:stop], merged.dtype))
    if base.dtype == merged.dtype:
        buffer = np.empty(CHUNK, np.uint8)
        return _differs(merged, lambda start, stop: base.rows(start, stop, buffer))
    if base.dtype not in UNIT or merged.dtype not in UNIT:
        return tensor_missing(f"it is {merged.dtype}, the base's is {base.dtype}")
    return _differs(merged, lambda start, stop: narrow(widen(base.rows(start, stop), base.dtype), merged.dtype))


def _differs(merged: StoredTensor, wanted: Callable[[int, int], Raw]) -> Finding | None:
    values, distance, norm = 0, 0.0, 0.0
    buffer = np.empty(CHUNK, np.uint8)
    for start, stop in chunks(merged):
        there: Raw = merged.rows(start, stop, buffer)
        here: Raw = wanted(start, stop)
        if np.array_equal(there.view(np.uint8), here.view(np.uint8)):
            continue
        values += int(np.count_nonzero(there != here))
        if merged.dtype in UNIT:
            one, two = widen(there, merged.dtype), widen(here, merged.dtype)
            with np.errstate(invalid="ignore", over="ignore"):
                distance += float(np.square(one - two, dtype=np.float64).sum())
                norm += float(np.square(two, dtype=np.float64).sum())
    if not values:
        return None
    relative = (distance / norm) ** 0.5 if norm > 0 else float("inf")
    return untouched_changed(values, int(np.prod(merged.shape, dtype=np.int64)), relative)


def chunks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Stretches of rows of about CHUNK bytes."""
    height, _ = tensor.matrix
    step = max(1, CHUNK * height // max(tensor.size, 1))
    for start in range(0, height, step):
        yield start, min(start + step, height)
