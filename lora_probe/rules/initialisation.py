"""Whether a pair is a part of the base model's own weight, as after PiSSA and OLoRA initialisation.

In: A and B of a module, and its weight W in the base. Out: the cosine between A and A computed from B and W. PiSSA
(Meng et al., 2024, arXiv:2404.02948) starts from the singular vectors of W, OLoRA (Büyükakyüz, 2024, arXiv:2406.01775)
from its QR decomposition; in both A = B⁺·W up to a factor, while a pair that started at zero is unrelated to W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.pair_values import pair_values
from lora_probe.base import Base
from lora_probe.errors import UnreadableFile
from lora_probe.files.values import read
from lora_probe.files.weights import open_weights

Floats = npt.NDArray[np.float32]

SAMPLED = 3
"""Number of modules that are checked: the first, the last, and one between them."""
MOST = 2**27
"""The most values of a weight that is read for this: 512 MiB as float32."""
BALANCED = 0.9
"""PiSSA's A·Aᵀ and Bᵀ·B are the same diagonal matrix, OLoRA's Bᵀ·B is the identity. Pairs that are far from both, like
all that started at zero, need not be compared with the base."""


def alignments(adapter: Adapter, base: Base) -> Iterator[tuple[AdapterModule, float]]:
    """The cosine for some modules of the adapter. Empty if the pairs do not look like such an initialisation."""
    # With one row of A a match may be chance.
    fitting = [p for p in adapter.modules if p.parameter == "weight" and fits(p, base) and (p.rank or 0) > 1]
    for pair in spread(fitting, SAMPLED):
        try:
            a, b = pair_values(adapter, pair)
            if not _balanced(a, b):
                return
            weight = weight_of(base, pair.module)
        except UnreadableFile:
            continue
        if weight is not None:
            yield pair, alignment(a, b, weight)


def alignment(a: Floats, b: Floats, weight: Floats) -> float:
    """|cos| between A and B⁺·W. `a: [r, in]`, `b: [out, r]`, `weight: [out, in]`."""
    meant = np.linalg.pinv(b) @ weight
    size = float(np.linalg.norm(a) * np.linalg.norm(meant))
    return abs(float((a * meant).sum())) / size if size else 0.0


def spread(pairs: Sequence[AdapterModule], most: int) -> list[AdapterModule]:
    """At most `most` of the pairs: the first, the last, and others evenly between them."""
    last = len(pairs) - 1
    numbers = {round(last * number / (most - 1)) for number in range(most)} if pairs else set()
    return [pairs[number] for number in sorted(numbers)]


def fits(pair: AdapterModule, base: Base, transposed: bool = False) -> bool:
    """Whether A and B are matrices of the shape of a weight of the base that is small enough to be read. `transposed`:
    the base stores its weights as (in, out)."""
    shape = base.shapes.get(pair.module)
    if shape is None or pair.a is None or pair.b is None or pair.embedding or shape[0] * shape[1] > MOST:
        return False
    shape = shape[::-1] if transposed else shape
    return pair.matrices and (pair.b.shape[0], pair.inputs) == shape


def _balanced(a: Floats, b: Floats) -> bool:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return False
    rows, columns = a @ a.T, b.T @ b
    return max(_cosine(rows, columns), _cosine(columns, np.eye(len(columns), dtype=np.float32))) > BALANCED


def _cosine(x: Floats, y: Floats) -> float:
    size = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float((x * y).sum()) / size if size else 0.0


def weight_of(base: Base, module: str) -> Floats | None:
    """The weight of a module, read from the safetensors files of a base."""
    for file in sorted(base.path.glob("*.safetensors")):
        weights = open_weights(file)
        if (tensor := weights.tensors.get(f"{module}.weight")) is not None:
            return read(weights, tensor)
    return None
