"""LP2xx: a second weights file next to the one that is read. In: a `Subject`. Out: `AdapterFinding`s."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_probe.adapter.file_names import LOADED
from lora_probe.adapter.folder import inside
from lora_probe.errors import ProbeError
from lora_probe.files.pickled import open_by_content
from lora_probe.files.values import read_chunk
from lora_probe.files.weights import WeightsFile
from lora_probe.rules.registry import AdapterFinding, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject


@survey(
    "LP224",
    "second-weights-file",
    severity="warning",
    hint="compare both with the training run, and delete the one that is out of date",
)
def second_weights_file(subject: Subject) -> Iterator[AdapterFinding]:
    """Two weights files lie next to each other, and hold different tensors.

    What it does: compares names, shapes, dtypes and values of adapter_model.safetensors, adapter_model.bin and
    adapter_model.pt. Files that hold the same are not reported.

    Why it matters: PEFT 0.21 and vLLM ({vllm}) both read adapter_model.safetensors and silently ignore the others;
    without it both read adapter_model.bin. If a training run wrote the .bin last, the engines serve the older weights.

    Fix: keep the right file.
    """
    adapter = subject.adapter
    names = LOADED[LOADED.index(adapter.weights.path.name) + 1 :]
    for path in (adapter.path / name for name in names if (adapter.path / name).is_file()):
        if (different := _different(adapter.weights, path)) is not None:
            yield AdapterFinding(
                f"{path.name} holds other weights than {adapter.weights.path.name} ({different}); "
                f"PEFT and vLLM read {adapter.weights.path.name} and ignore {path.name}",
                path=path,
            )


def _different(weights: WeightsFile, path: Path) -> str | None:
    """How the tensors of `path` differ from those of `weights`; None if they do not, or if it cannot be read."""
    try:
        other = open_by_content(inside(path.parent, path.name))
    except ProbeError:
        # No engine reads this file, so that it is damaged has no consequence.
        return None
    if other is None:
        return None
    names = weights.tensors.keys() | other.tensors.keys()
    count = sum(not _equal(weights, other, name) for name in names)
    return f"{count} of {len(names)} tensors differ" if count else None


def _equal(weights: WeightsFile, other: WeightsFile, name: str) -> bool:
    one, two = weights.tensors.get(name), other.tensors.get(name)
    if one is None or two is None or (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    chunks = (read_chunk(file, tensor, 0, tensor.parameters) for file, tensor in ((weights, one), (other, two)))
    left, right = (np.ascontiguousarray(chunk).view(np.uint8) for chunk in chunks)
    return bool(np.array_equal(left, right))
