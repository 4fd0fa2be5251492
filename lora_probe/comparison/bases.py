"""Whether the base models of two runs are the same: by their answers, by x, and by the files on disk.

In: a comparison's modules and outputs, and the folders of the models. Out: the reasons to think that they differ, and
the names of tensors whose values do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_probe.base import StoredTensor, open_checkpoint
from lora_probe.comparison.answers import Agreement, Outputs
from lora_probe.comparison.modules import ModuleDiff
from lora_probe.errors import ProbeError
from lora_probe.files.values import digest_of_values
from lora_probe.names import layer_of, name_modules, path_of
from lora_probe.precision import logprob_drift
from lora_probe.recording import Trace

LARGEST = 4 * 2**30
"""Bytes of a base model whose tensors are read to name those that differ: some seconds, within the limits of the
command."""
HEAD = re.compile(r"(?:^|\.)(?:score|classifier|qa_outputs|pre_classifier|regression_head)\.")
"""Transformers' names for the heads of tasks."""


def reasons(
    modules: Sequence[ModuleDiff], outputs: Outputs, dtype: str, limit: float, own_head: bool = False
) -> Iterator[str]:
    """Why the base models seem to differ. `modules` are in the order of computation. With `own_head`, the
    adapter makes a classifier of a base that has none: then each engine makes one up for the base's answers."""
    base = Agreement() if own_head else outputs.base
    if base.differs(dtype):
        if base.logprob_error is not None and base.logprob_error > logprob_drift(dtype):
            yield f"log-probabilities of the base differ by {base.logprob_error:.2g}"
        else:
            yield f"the base's next-token distributions differ by a KL of {base.kl:.2g} nats"
    elif base.logprob_error is not None or base.kl is not None:
        # The bases agree, so another x is due to embeddings that the adapter brings.
        return
    first = _first_layer(modules)
    off = [diff for diff in first if diff.x_error is not None and diff.x_error > limit]
    if first and len(off) == len(first):
        worst = max(off, key=lambda diff: diff.x_error or 0.0)
        name = name_modules([path_of(worst.key)])
        yield f"‖x‖ of {name} differs by {worst.x_error:.2g}, before any module of the adapter"


def has_own_head(trace: Trace) -> bool:
    """Whether the adapter brings a head that its base does not have, as classifiers do."""
    names = (name for of_load in trace.other_tensors.values() for name in of_load if ".lora_" not in name)
    return any(HEAD.search(name) for name in names)


def _first_layer(modules: Sequence[ModuleDiff]) -> list[ModuleDiff]:
    """The modules whose input no other module of the adapter has changed: those of the first attention layer that take
    its input. An adapted embedding comes before all of them."""
    layers = [layer for diff in modules if (layer := layer_of(diff.module)) is not None]
    if not layers or any(layer_of(diff.module) is None and "embed" in diff.module for diff in modules):
        return []
    of_first = [diff for diff in modules if layer_of(diff.module) == min(layers)]
    return [diff for diff in of_first if diff.module.endswith(("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"))]


def different_tensors(reference: Trace, candidate: Trace) -> tuple[str, ...]:
    """The tensors whose values differ in the folders of the two base models, as far as both are at hand."""
    folders = [trace.run.spec.model if trace.run is not None else "" for trace in (reference, candidate)]
    if not all(folders) or _same(*folders):
        return ()
    try:
        one, two = (open_checkpoint(folder).tensors for folder in folders)
    except ProbeError:
        # A model that ran on another machine is not here.
        return ()
    if max(sum(tensor.size for tensor in side.values()) for side in (one, two)) > LARGEST:
        return ()
    names = sorted(one.keys() ^ two.keys())
    names += sorted(name for name in one.keys() & two.keys() if _digest(one[name]) != _digest(two[name]))
    return tuple(names)


def _same(one: str, two: str) -> bool:
    return one == two or Path(one).resolve() == Path(two).resolve()


def _digest(tensor: StoredTensor) -> str:
    return digest_of_values(tensor.dtype, tensor.shape, lambda start, stop: tensor.read(start, stop, None))
