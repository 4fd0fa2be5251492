"""The contribution of DoRA, from its formula.

In: a live layer with its base weight, and A, B, the magnitudes m and the scaling of the file. Out: for inputs x what
DoRA adds to the base output: (c - 1)·x·Wᵀ + c·s·x·Aᵀ·Bᵀ with c = m / ‖W + s·B·A‖ for every row of W (arXiv:2402.09353);
and what a bound of its rounding is a share of.
"""

from __future__ import annotations

import numpy as np

from lora_probe.engines.peft.slots import Slot
from lora_probe.recording import Floats


def base_weight(slot: Slot) -> Floats | None:
    """W `[out, in]` of a live layer; None for a quantised one."""
    weight = slot.layer.base_layer.weight.detach()
    if not weight.is_floating_point() or weight.ndim != 2:
        return None
    values: Floats = weight.float().cpu().numpy()
    # An embedding looks up rows, as a product with a one-hot x would.
    return values.T if slot.looks_up or slot.layer.fan_in_fan_out else values


def why_no_formula(slot: Slot) -> str | None:
    """Why a live layer's contribution cannot be compared; None if it can."""
    if base_weight(slot) is None:
        return "DoRA's formula needs the base weight, which is quantised"
    dtype = str(slot.magnitudes.weight.dtype).removeprefix("torch.")
    if dtype != "float32":
        # PEFT rounds m / ‖W + s·B·A‖ to that, and what is left after 1 is subtracted may be smaller.
        return f"PEFT computes DoRA in {dtype} here, whose rounding may exceed the contribution"
    return None


def decomposed(
    x: Floats, weight: Floats, a: Floats, b: Floats, scaling: float, magnitude: Floats
) -> tuple[Floats, Floats]:
    """What DoRA adds for each row of `x: [rows, in]`, and the same sum without any cancellation: `[rows, out]` each."""
    factor = magnitude / np.linalg.norm(weight + np.float32(scaling) * (b @ a), axis=1)
    reference = (factor - 1) * (x @ weight.T) + factor * ((x @ a.T) @ b.T) * np.float32(scaling)
    of_base = np.abs(factor - 1) * (np.abs(x) @ np.abs(weight).T)
    of_pair = np.abs(factor * np.float32(scaling)) * ((np.abs(x) @ np.abs(a).T) @ np.abs(b).T)
    return reference.astype(np.float32), (of_base + of_pair).astype(np.float32)
