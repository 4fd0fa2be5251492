"""Pairs of fused experts (`target_parameters`): A and B of a single expert.

PEFT's `ParamWrapper` keeps all experts of a parameter in one pair: in A `[experts·r, in]` the expert runs slowest, in B
`[out, r·experts]` fastest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def of_expert(a: Floats, b: Floats, experts: int, number: int) -> tuple[Floats, Floats]:
    """A `[r, in]` and B `[out, r]` of one of `experts`."""
    return np.split(a, experts)[number], np.ascontiguousarray(b[:, number::experts])


def of_each(a: Floats, b: Floats, experts: int) -> Iterator[tuple[Floats, Floats]]:
    """A and B of one expert after the other."""
    return (of_expert(a, b, experts, number) for number in range(experts))
