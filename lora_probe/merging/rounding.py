"""The grids that weights lie on: float32 values rounded to a file's dtype as torch rounds them (to nearest even).

In: float32 arrays and the name of a dtype in safetensors files (F32, F16, BF16). Out: values as they lie in a file, or
widened again. numpy has no bfloat16: it is the upper half of a float32, rounded by hand.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_probe.files.values import Raw, widen
from lora_probe.precision import STORED, rounding

Floats = npt.NDArray[np.float32]

_QUIET_NAN = np.uint16(0x7FC0)


def narrow(values: Floats, dtype: str) -> Raw:
    """`values` on the grid of `dtype`, as they lie in a file. Ties go to even, as in torch's `Tensor.to`."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        wide = bits >> 16
        wide &= 1
        wide += 0x7FFF
        wide += bits
        wide >>= 16
        result = wide.astype(np.uint16)
        # The carry would turn some NaNs into numbers. The sum shows in one cheap pass whether there are any.
        with np.errstate(invalid="ignore", over="ignore"):
            suspicious = np.isnan(values.sum(dtype=np.float32))
        if suspicious:
            result[np.isnan(values)] = _QUIET_NAN
        return result
    with np.errstate(over="ignore"):
        rounded: Raw = values.astype(STORED[dtype].storage, copy=False)
    return rounded


def through(values: Floats, dtype: str | None) -> Floats:
    """`values` rounded to `dtype` and widened again; None and F32 change nothing."""
    return values if dtype in (None, "F32") else widen(narrow(values, dtype), dtype)


def spacing(values: Floats, dtype: str) -> Floats:
    """The distance between neighbours of the grid of `dtype` at each of `values`."""
    smallest = np.float32(rounding(dtype).smallest)
    exponent = np.frexp(np.maximum(np.abs(values), smallest))[1]
    with np.errstate(under="ignore"):
        steps = np.ldexp(np.float32(2 * rounding(dtype).round_off), exponent - 1)
    result: Floats = np.maximum(steps, smallest).astype(np.float32)
    return result
