"""Fingerprints of s·B·A: a few numbers for the weights that a load runs with at a module.

In: A and s·B of a load, from its file, and from its slots when they were filled. Out: `P·s·B·A·Q` with fixed random P
and Q. It is linear in the weights: that of twice the weights is twice as large, and that of a difference is the
difference. So from two traces alone follow the factor between two weights, its sign, how far they are apart otherwise,
and whose weights they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lora_probe.errors import UnreadableFile
from lora_probe.names import Key
from lora_probe.recording.placed import Floats
from lora_probe.recording.process_trace import ProcessTrace
from lora_probe.recording.records import WeightsRecord
from lora_probe.recording.sketch import SKETCH, projection

SIDE = 6
"""A fingerprint is SIDE x SIDE numbers: a norm computed from it is accurate to about 25 % (one standard deviation)."""


def fingerprint(a: Floats, scaled_b: Floats) -> Floats:
    """The fingerprint of s·B·A, `[SIDE²]`, of `a: [r, in]` and `scaled_b: [out, r]`."""
    of_inputs = projection(a.shape[1])[:, :SIDE]
    of_outputs = projection(scaled_b.shape[0])[:, SIDE : 2 * SIDE]
    product = (of_outputs.T @ scaled_b) @ (a @ of_inputs)
    # The projection keeps the lengths of SKETCH numbers.
    return np.asarray(product * np.float32(SKETCH / SIDE), np.float32).ravel()


def weights_record(load: int, fingerprints: Mapping[Key, Floats], in_file: bool = False) -> WeightsRecord:
    """What a trace keeps of them."""
    values = np.stack(list(fingerprints.values())).astype("<f4")
    return WeightsRecord(load, list(fingerprints), values.tobytes(), in_file)


def fingerprints_in(processes: Iterable[ProcessTrace], in_file: bool = False) -> dict[int, dict[Key, Floats]]:
    """The fingerprints of the modules of each load, of its live weights or of those in its file. Of weights that
    changed while the load was active, the last ones count.

    Raises:
        UnreadableFile: a record has another number of values than modules.
    """
    weights: dict[int, dict[Key, Floats]] = {}
    for process in processes:
        for record in process.of(WeightsRecord):
            if record.in_file != in_file:
                continue
            if len(record.fingerprints) != 4 * SIDE**2 * len(record.keys):
                raise UnreadableFile(f"a record of weights in `{process.folder}` is damaged", "record the trace again")
            values = np.frombuffer(record.fingerprints, "<f4").reshape(-1, SIDE**2)
            weights.setdefault(record.load, {}).update(zip(record.keys, values, strict=True))
    return weights
