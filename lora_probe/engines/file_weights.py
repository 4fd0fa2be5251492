"""The fingerprints of the weights in an adapter's files.

In: an adapter and the modules that are expected of it. Out: a fingerprint for each module with one pair, and digests of
all other tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.files.values import digest_of_values, read_chunk
from lora_probe.files.weights import TensorHeader, WeightsFile
from lora_probe.names import Key
from lora_probe.recording.fingerprint import Fingerprint, fingerprint
from lora_probe.rules.stored import Expected


def fingerprints_of(adapter: Adapter, expected: Iterable[Expected]) -> dict[Key, Fingerprint]:
    """The fingerprints of the pairs whose B·A is a matrix of the module: fused experts have none, and neither has what
    cannot be read."""
    fingerprints: dict[Key, Fingerprint] = {}
    for row in expected:
        pair = row.entry
        # Without a spectrum the values could not be read, or are not a pair of matrices.
        if pair is None or row.spectrum is None or row.key[1] != "weight" or pair.a is None or pair.b is None:
            continue
        a, b = adapter.values(pair.a), adapter.values(pair.b)
        if a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
            fingerprints[row.key] = fingerprint(a, b * np.float32(pair.scaling))
    return fingerprints


def digests_of_others(adapter: Adapter, expected: Iterable[Expected], covered: Collection[Key]) -> dict[str, str]:
    """The digests of all tensors that are no A or B of `covered` modules: magnitudes, biases, experts, whole modules.
    None for an adapter without files."""
    if adapter.content:
        return {}
    pairs = [row.entry for row in expected if row.key in covered and row.entry is not None]
    names = {half.name for pair in pairs for half in (pair.a, pair.b) if half is not None}
    tensors = adapter.weights.tensors.values()
    return {tensor.name: _digest(adapter.weights, tensor) for tensor in tensors if tensor.name not in names}


def _digest(weights: WeightsFile, tensor: TensorHeader) -> str:
    read = partial(read_chunk, weights, tensor)
    return digest_of_values(tensor.dtype, tensor.shape, read)[:16]
