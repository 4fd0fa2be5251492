"""The fingerprints of the weights in an adapter's files.

In: an adapter and the modules that are expected of it. Out: a fingerprint of s·B·A for each module with one pair.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lora_probe.adapter import Adapter
from lora_probe.names import Key
from lora_probe.recording import Floats
from lora_probe.recording.fingerprint import fingerprint
from lora_probe.rules.stored import Expected


def fingerprints_of(adapter: Adapter, expected: Iterable[Expected]) -> dict[Key, Floats]:
    """The fingerprints of the pairs whose B·A is a matrix of the module: fused experts have none, and neither has what
    cannot be read."""
    fingerprints: dict[Key, Floats] = {}
    for row in expected:
        pair = row.entry
        # Without a spectrum the values could not be read, or are not a pair of matrices.
        if pair is None or row.spectrum is None or row.key[1] != "weight" or pair.a is None or pair.b is None:
            continue
        a, b = adapter.values(pair.a), adapter.values(pair.b)
        if a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
            fingerprints[row.key] = fingerprint(a, b * np.float32(pair.scaling))
    return fingerprints
