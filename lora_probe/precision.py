"""How far two right answers may lie apart, from the dtype and from what clean runs showed.

In: the name of a dtype as torch spells it. Out: a relative tolerance: unit round-off of the dtype, times a slack that
was measured and is written down here with its measurement.
"""

from __future__ import annotations

import math

ROUND_OFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

AGREES_SLACK = {"float32": 168.0, "float16": 8.0, "bfloat16": 4.0}
DRIFT_SLACK = {"float32": 1024.0, "float16": 64.0, "bfloat16": 32.0}


def agrees(dtype: str) -> float:
    """For one module and the same x: the kernel's contribution against s·(x·Aᵀ)·Bᵀ in float32 from the file.

    Clean runs over all modules of SmolLM2-135M and of tiny models stay below 7e-7 in float32 (11 units, of sums over
    up to 1536 inputs) and 6e-3 in bfloat16 (1.5 units: A, B and the shrink are each rounded once).
    """
    return _units(dtype, AGREES_SLACK)


def drift(dtype: str) -> float:
    """For one module in two engines and the same tokens: what the layers before it make of their round-off as well.

    PEFT against vLLM, SmolLM2-135M (30 layers, q, k and v adapted), worst of 90 modules: over prompt rows alone 3.9e-6
    in float32 (66 units) and 3.6e-2 in bfloat16 (9.3 units), over all rows 2.8e-6 and 2.1e-2. float16 has not been
    measured.
    """
    return _units(dtype, DRIFT_SLACK)


ROW_SLACK = 5.0
"""A single row may lie this many times further off than `drift`: 2.4e-5 in float32 and 0.19 in bfloat16 were seen, of
3.1e-4 and 0.63 allowed."""


def coarser(*dtypes: str) -> str:
    """The dtype that decides: the coarsest on the way."""
    return max(dtypes, key=lambda dtype: ROUND_OFF.get(dtype, ROUND_OFF["bfloat16"]))


def _units(dtype: str, slack: dict[str, float]) -> float:
    """An unknown dtype is taken for the coarsest that is known."""
    return ROUND_OFF.get(dtype, ROUND_OFF["bfloat16"]) * slack.get(dtype, slack["bfloat16"])


def finite(value: float | None) -> float | None:
    """The number if JSON can represent it, None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
