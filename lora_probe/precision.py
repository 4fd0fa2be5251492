"""Dtypes: what each is called, how its values are held, how it rounds, and how far two correct results may differ.

In: the name of a dtype, torch's (`bfloat16`) or that of safetensors files (`BF16`). Out: its row of the one table, or a
relative tolerance: the unit round-off of the dtype times a slack that was measured and stands here with its
measurement. A name that is not in the table is an `UnknownDtype`, never some other dtype's tolerance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rounding:
    """How a float dtype rounds. `round_off` is the unit round-off, `smallest` the spacing of its values around zero.

    `agrees`, `drift`, `logprob` and `floor` are slacks in units of round-off; the functions of these names explain
    them.
    """

    round_off: float
    smallest: float
    agrees: float
    drift: float
    logprob: float
    floor: float


@dataclass(frozen=True)
class Dtype:
    """One dtype: torch's name, the name in safetensors files, numpy's storage type, bytes for each value.

    `rounding` is None for what lora-probe copies and does not compute with. numpy has no bfloat16 and no 8-bit floats:
    it holds their raw bits.
    """

    name: str
    stored: str
    storage: str
    width: int
    rounding: Rounding | None = None

    @property
    def fits_float32(self) -> bool:
        """Whether float32 holds all of its values: engines run in these, and merges are replayed in them."""
        return self.rounding is not None and self.rounding.round_off >= FLOAT32.round_off


FLOAT32 = Rounding(2.0**-24, 2.0**-149, agrees=168.0, drift=1024.0, logprob=4096.0, floor=128.0)
BFLOAT16 = Rounding(2.0**-8, 2.0**-133, agrees=4.0, drift=32.0, logprob=128.0, floor=32.0)

DTYPES = (
    Dtype("float64", "F64", "<f8", 8, replace(FLOAT32, round_off=2.0**-53, smallest=2.0**-1074)),
    Dtype("float32", "F32", "<f4", 4, FLOAT32),
    Dtype("float16", "F16", "<f2", 2, Rounding(2.0**-11, 2.0**-24, agrees=8.0, drift=64.0, logprob=256.0, floor=32.0)),
    Dtype(
        "bfloat16", "BF16", "<u2", 2, Rounding(2.0**-8, 2.0**-133, agrees=4.0, drift=32.0, logprob=128.0, floor=32.0)
    ),
    Dtype("int64", "I64", "<i8", 8),
    Dtype("int32", "I32", "<i4", 4),
    Dtype("int16", "I16", "<i2", 2),
    Dtype("int8", "I8", "<i1", 1),
    Dtype("uint64", "U64", "<u8", 8),
    Dtype("uint32", "U32", "<u4", 4),
    Dtype("uint16", "U16", "<u2", 2),
    Dtype("uint8", "U8", "<u1", 1),
    Dtype("bool", "BOOL", "|b1", 1),
    Dtype("float8_e4m3fn", "F8_E4M3", "<u1", 1),
    Dtype("float8_e5m2", "F8_E5M2", "<u1", 1),
    Dtype("float8_e8m0fnu", "F8_E8M0", "<u1", 1),
)

STORED = {dtype.stored: dtype for dtype in DTYPES}
"""By the name in safetensors files."""
FLOATS = tuple(dtype.stored for dtype in DTYPES if dtype.rounding is not None)
"""The names in safetensors files of the dtypes whose values are read and computed with."""
_ROUNDING = {name: dtype.rounding for dtype in DTYPES if dtype.rounding for name in (dtype.name, dtype.stored)}

NOT_RECORDED = ""
"""The dtype of a process that ended before it recorded one. It counts as the coarsest of the table."""
_COARSEST = max(_ROUNDING.values(), key=lambda rounding: rounding.round_off)


KNOWN = ", ".join(dtype.name for dtype in DTYPES if dtype.rounding)


class UnknownDtype(ValueError):
    """A dtype that lora-probe has no round-off for."""

    def __init__(self, dtype: str) -> None:
        super().__init__(f"unknown dtype `{dtype}` (known: {KNOWN})")


def rounding(dtype: str) -> Rounding:
    """How `dtype` rounds.

    Raises:
        UnknownDtype: the table does not have it, or has no round-off for it.
    """
    if dtype == NOT_RECORDED:
        return _COARSEST
    if dtype not in _ROUNDING:
        raise UnknownDtype(dtype)
    return _ROUNDING[dtype]


def coarser(*dtypes: str) -> str:
    """The dtype that decides: the coarsest of those on the way, the first of several.

    Raises:
        UnknownDtype: one of them is not in the table.
    """
    return max(dtypes, key=lambda dtype: rounding(dtype).round_off, default=NOT_RECORDED)


def agrees(dtype: str) -> float:
    """For one module and the same x: the kernel's contribution against s·(x·Aᵀ)·Bᵀ in float32 from the file.

    Clean runs over all modules of SmolLM2-135M and of tiny models stay below 7e-7 in float32 (11 units, of sums over
    up to 1536 inputs) and 6e-3 in bfloat16 (1.5 units: A, B and the shrink are each rounded once). float16 has not been
    measured.
    """
    return _unit(dtype) * rounding(dtype).agrees


def drift(dtype: str) -> float:
    """For one module in two engines and the same tokens: includes the round-off of all layers before it.

    PEFT against vLLM, SmolLM2-135M (30 layers, q, k and v adapted), worst of 90 modules: over prompt rows alone 3.9e-6
    in float32 (66 units) and 3.6e-2 in bfloat16 (9.3 units), over all rows 2.8e-6 and 2.1e-2. With all linear layers
    adapted 93 and 16 units (`benchmarks/calibration.md`). float16 has not been measured.
    """
    return _unit(dtype) * rounding(dtype).drift


ROW_SLACK = 5.0
"""The error of a single row may be this many times `drift`: 2.4e-5 in float32 and 0.19 in bfloat16 were measured, of
3.1e-4 and 0.63 allowed."""


def logprob_drift(dtype: str) -> float:
    """For the log-probability of one token in two engines, of the same tokens and the same model: natural
    logarithms."""
    return _unit(dtype) * rounding(dtype).logprob


def floor(dtype: str) -> float:
    """The smallest KL of base and unmerged adapter, in nats per token, that can be told from round-off.

    KL is quadratic in a small change, so this is the square of `floor` units of round-off: 5.8e-11 in float32 and
    1.6e-2 in bfloat16. Correct merges of SmolLM2-135M lie 8e-13 and 3.6e-4 from the unmerged adapter in PEFT, 4.3e-12
    and 9.4e-4 in vLLM. float16 has not been measured.
    """
    return (_unit(dtype) * rounding(dtype).floor) ** 2


def _unit(dtype: str) -> float:
    """The round-off that tolerances count in. Traces and references hold float32, so nothing finer can be judged."""
    return max(rounding(dtype).round_off, FLOAT32.round_off)


def finite(value: float | None) -> float | None:
    """The number if JSON can represent it, None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


SAME_FACTOR = 2e-3
"""Factors of two measured weights that are closer than this are one factor."""


def same_factor(one: float, two: float) -> bool:
    """Whether `two` is the factor `one`, within what is measured."""
    return abs(two - one) <= SAME_FACTOR * abs(one)


def factor_text(factor: float) -> str:
    """A factor with as many digits as tell it from 1."""
    return f"{factor:.4g}" if abs(factor - 1) >= 1e-3 else f"{factor:.7f}"
