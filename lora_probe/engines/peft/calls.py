"""Calls of PEFT's variants of LoRA, each of which adds its contribution to the base output inside one function.

In: the slot of a live layer that runs a variant (aLoRA, BD-LoRA, KaSA, MiCA, MonteCLoRA, VeLoRA). Out: x, x·Aᵀ and the
contribution of every call, during a `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_probe.engines.peft.slots import Slot
from lora_probe.precision import rounding

AfterCall = Callable[[Any, Any, Any], None]
"""Is called with x `[rows, in]`, x·Aᵀ `[rows, r]` and the contribution `[rows, out]`."""


@contextmanager
def calls(slot: Slot, after: AfterCall) -> Iterator[None]:
    """Call `after` for every call of the variant that a slot runs."""
    variant = slot.variant
    original = variant.forward

    def forward(module: Any, *, active_adapter: str, x: Any, result: Any, **options: Any) -> Any:
        # Some variants add to `result` in place.
        base = result.clone()
        delta = original(
            module, active_adapter=active_adapter, x=x, result=base.new_zeros(base.shape).float(), **options
        )
        output = original(module, active_adapter=active_adapter, x=x, result=result, **options)
        if not is_sum(output, base, delta):
            # It added something else: what is left of that in the output is rounded to the output's size.
            delta = output - base
        rows = delta.flatten(0, -2)
        inputs = x.flatten(0, -2)
        after(inputs, _shrink(slot, inputs).masked_fill((rows == 0).all(-1, keepdim=True), 0), rows)
        return output

    variant.forward = forward
    try:
        yield
    finally:
        del variant.forward


def is_sum(output: Any, base: Any, delta: Any) -> bool:
    """Whether `output` is base + delta, but for the rounding of its dtype."""
    unit = rounding(str(output.dtype).removeprefix("torch.")).round_off
    error = (base.float() + delta.float() - output.float()).abs()
    # Both addends and the sum may have been rounded once.
    bound = 4 * unit * (base.float().abs() + delta.float().abs())
    return bool((error <= bound).all())


def _shrink(slot: Slot, x: Any) -> Any:
    """x·Aᵀ `[rows, r]`, with the diagonal of KaSA."""
    shrink = slot.a(x.to(slot.a.weight.dtype))
    return shrink if slot.diagonal is None else shrink * slot.diagonal
