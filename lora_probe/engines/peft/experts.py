"""PEFT's wrappers of fused expert parameters: the weights that they add, expert by expert.

In: a live `ParamWrapper`. Out: which experts hold something else than expected, and ΔW of all of them as PEFT adds it.
PEFT computes no x·A·B for experts: while they run, it replaces their parameter W by W + s·B·A.
"""

from __future__ import annotations

from typing import Any

from lora_probe.recording import Floats


def differing(live: Any, expected: Any, experts: int, half: str) -> list[int]:
    """The experts of which one half of a pair, `lora_A` or `lora_B`, is another one. Two tensors of one shape."""
    differs = (live != expected).cpu().numpy()
    by_expert = differs.reshape(experts, -1) if half == "lora_A" else differs.reshape(-1, experts).T
    return [number for number, differences in enumerate(by_expert) if differences.any()]


def is_adding(wrapper: Any) -> bool:
    """Whether the wrapper changes its parameter right now."""
    return wrapper.parameter_name in getattr(wrapper.get_base_layer(), "parametrizations", {})


def added(wrapper: Any) -> Floats:
    """What an active wrapper adds to its parameter, `[experts, out, in]`."""
    changes = wrapper.get_base_layer().parametrizations[wrapper.parameter_name]
    delta = changes.original.detach().new_zeros(changes.original.shape)
    for change in changes:
        delta = change(delta)
    values: Floats = delta.detach().float().cpu().numpy()
    if values.ndim == 2:
        return values[None]
    # The model's class decides how it stores the matrices of its experts.
    return values if wrapper._did_swap_in_out_features else values.swapaxes(1, 2)
