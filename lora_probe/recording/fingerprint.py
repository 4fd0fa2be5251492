"""Fingerprints of s·B·A: a few numbers for the weights that a load runs with at a module.

In: A and s·B of a load, from its file, and from its slots when they were filled. Out: `P·s·B·A·Q` with fixed random P
and Q. It is linear in the weights: that of twice the weights is twice as large, and that of a difference is the
difference. So from two traces alone follow the factor between two weights, its sign, how far they are apart otherwise,
and whose weights they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from lora_probe.errors import UnreadableFile
from lora_probe.names import Key
from lora_probe.recording.placed import Floats
from lora_probe.recording.process_trace import ProcessTrace
from lora_probe.recording.records import WeightsRecord
from lora_probe.recording.sketch import SKETCH, projection

SIDE = 6
"""A fingerprint is SIDE x SIDE numbers: a norm computed from it is accurate to about 25 % (one standard deviation)."""
RANKS = 1024
"""A larger rank than any adapter has."""


@dataclass(frozen=True)
class Fingerprint:
    """The weights of a module: `product` of s·B·A, and `a` of A alone, `[SIDE²]` each. Two pairs may have the same
    product and different A."""

    product: Floats
    a: Floats


def fingerprint(a: Floats, scaled_b: Floats) -> Fingerprint:
    """Of `a: [r, in]` and `scaled_b: [out, r]`."""
    of_inputs = projection(a.shape[1])[:, :SIDE]
    of_outputs = projection(scaled_b.shape[0])[:, SIDE : 2 * SIDE]
    # A smaller rank is the same as one that is padded with zeros.
    of_ranks = projection(max(RANKS, len(a)))[: len(a), :SIDE]
    inputs = a @ of_inputs
    # The projection keeps the lengths of SKETCH numbers.
    unit = np.float32(SKETCH / SIDE)
    products = (of_outputs.T @ scaled_b) @ inputs, of_ranks.T @ inputs
    product, alone = (np.asarray(values * unit, np.float32).ravel() for values in products)
    return Fingerprint(product, alone)


def weights_record(
    load: int, fingerprints: Mapping[Key, Fingerprint], in_file: bool = False, others: Mapping[str, str] | None = None
) -> WeightsRecord:
    """What a trace keeps of them."""
    parts = list(fingerprints.values())
    products, alone = (_bytes([getattr(part, name) for part in parts]) for name in ("product", "a"))
    return WeightsRecord(load, list(fingerprints), products, alone, in_file, dict(others or {}))


def _bytes(values: list[Floats]) -> bytes:
    return np.array(values, "<f4").tobytes()


def fingerprints_in(processes: Iterable[ProcessTrace], in_file: bool = False) -> dict[int, dict[Key, Fingerprint]]:
    """The fingerprints of the modules of each load, of its live weights or of those in its file. Of weights that
    changed while the load was active, the last ones count.

    Raises:
        UnreadableFile: a record has another number of values than modules.
    """
    weights: dict[int, dict[Key, Fingerprint]] = {}
    for process in processes:
        for record in process.of(WeightsRecord):
            if record.in_file != in_file:
                continue
            wanted = 4 * SIDE**2 * len(record.keys)
            if not len(record.fingerprints) == len(record.of_a) == wanted:
                raise UnreadableFile(f"a record of weights in `{process.folder}` is damaged", "record the trace again")
            products, alone = (
                np.frombuffer(values, "<f4").reshape(-1, SIDE**2) for values in (record.fingerprints, record.of_a)
            )
            of_load = weights.setdefault(record.load, {})
            for key, product, a in zip(record.keys, products, alone, strict=True):
                of_load[key] = Fingerprint(product, a)
    return weights


def other_tensors_in(processes: Iterable[ProcessTrace]) -> dict[int, dict[str, str]]:
    """The digests of the tensors in the file of each load that no fingerprint covers, by their names."""
    records = [record for process in processes for record in process.of(WeightsRecord) if record.in_file]
    return {record.load: record.others for record in records}
