"""Sampled rows of a step, compared with the adapter: the numbers behind `agrees`.

In: a `Step` after its layers ran, and a load that rows of it asked for. Out: samples, and rows of heads, in the load's
record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_probe.errors import ProbeError
from lora_probe.names import Key
from lora_probe.recording import Floats
from lora_probe_vllm.experts import Routes, sample_routed
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.measured import Step

Heads = Mapping[int, Key]
"""By the number of a recorded head over the vocabulary: its module."""


def compare_samples(step: Step, routes: Routes, adapter: int, load: ActiveLoad) -> None:
    """Every layer's sampled rows of an adapter."""
    rows = [number for number, row in enumerate(step.sampled) if step.rows.lora[row] == adapter]
    if not rows:
        return
    for key, samples in step.samples.items():
        if key in load.homes and not _compare(load, key, *_on_host(samples, rows)):
            return
    for key, halves in step.halves.items():
        if key in load.homes and not _compare_halves(load, key, *(_on_host(half, rows) for half in halves)):
            return
    sample_routed(step, routes, rows, lambda key, part, x, delta: _compare(load, key, x, delta, part))


def count_heads(step: Step, heads: Heads, adapter: int, load: ActiveLoad) -> None:
    """The tokens that are sampled in a step, one for each request, and samples of their logits."""
    columns = step.rows.columns
    for number, key in heads.items():
        if (head := step.heads.get(number)) is None:
            continue
        last = np.flatnonzero(np.diff(columns.request, append=-1))
        requested = columns.lora[last] == adapter
        ran = requested & (head.slots.cpu().numpy() == load.slot)
        load.record.routed([key], int(requested.sum()), int(ran.sum()))
        rows = [row for row, request in enumerate(head.sampled) if requested[request]]
        if rows and head.x is not None and head.delta is not None:
            _compare(load, key, *_on_host((head.x, head.delta), rows))


def _compare(load: ActiveLoad, key: Key, x: Floats, delta: Floats, part: tuple[int, int] | None = None) -> bool:
    """Compare samples of a module, or of an expert and projection of fused ones, with the adapter. False if a large
    adapter's file is gone: then `agrees` is not measured from here on."""
    try:
        fused = part is not None and load.homes[key].split
        expected = load.of_experts(key).get(part) if fused and part is not None else load.placement(key)
    except ProbeError:
        return False
    if expected is not None:
        # An engine's vocabulary may be padded.
        inputs, written = x[:, : expected.a.shape[1]], delta[:, : len(expected.b)]
        load.record.sample(key, inputs, written, expected.a, expected.b, expected.scaling)
    return True


def _compare_halves(load: ActiveLoad, key: Key, to_a: tuple[Floats, Floats], to_b: tuple[Floats, Floats]) -> bool:
    """The same for a fully sharded module: x and x·Aᵀ with this rank's part of A, all of x·Aᵀ and delta with its part
    of B."""
    try:
        expected = load.placement(key)
    except ProbeError:
        return False
    if expected is not None:
        (x, part), (shrink, delta) = to_a, to_b
        rank, whole = len(expected.a), expected.b.shape[1]
        if rank:
            load.record.sample_shrink(key, x, part[:, :rank], expected.a)
        identity = np.eye(whole, dtype=np.float32)
        load.record.sample(key, shrink[:, :whole], delta, identity, expected.b, expected.scaling)
    return True


def _on_host(samples: tuple[Any, Any], rows: list[int]) -> tuple[Floats, Floats]:
    """Some of the sampled rows."""
    x, delta = (tensor[rows].float().cpu().numpy() for tensor in samples)
    return x, delta
