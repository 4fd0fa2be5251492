"""The table of dtypes, and the error for a dtype that is not in it. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from test_trace_format import process
from traces import write

from lora_probe import open_trace
from lora_probe.comparison import compare
from lora_probe.comparison.effect import effect
from lora_probe.comparison.tolerance import NOT_RECORDED_NOTE
from lora_probe.errors import UnreadableFile
from lora_probe.files.values import read
from lora_probe.files.weights import TensorHeader, WeightsFile
from lora_probe.merging.rounding import narrow, spacing
from lora_probe.precision import (
    DTYPES,
    FLOATS,
    STORED,
    Dtype,
    UnknownDtype,
    agrees,
    coarser,
    drift,
    floor,
    rounding,
)
from lora_probe.recording import Score, TraceWriter

COMPUTED = [dtype for dtype in DTYPES if dtype.rounding is not None]
NARROW = [dtype for dtype in DTYPES if dtype.fits_float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype_is_held_in_its_width(dtype: Dtype) -> None:
    assert STORED[dtype.stored] is dtype
    assert np.dtype(dtype.storage).itemsize == dtype.width
    assert [row.name for row in DTYPES].count(dtype.name) == [row.stored for row in DTYPES].count(dtype.stored) == 1


@pytest.mark.parametrize("dtype", COMPUTED, ids=lambda dtype: dtype.name)
def test_tolerances_of_every_float(dtype: Dtype) -> None:
    assert rounding(dtype.name) is rounding(dtype.stored) is dtype.rounding
    for tolerance in (agrees, drift, floor):
        # What is compared is float32, so no dtype is judged by less than float32 is.
        assert tolerance("float32") <= tolerance(dtype.name) < 2
    assert agrees(dtype.name) < drift(dtype.name)


@pytest.mark.parametrize("name", ["float64", "float32", "float16"])
def test_round_off_is_that_of_numpy(name: str) -> None:
    info = np.finfo(name)
    assert (rounding(name).round_off, rounding(name).smallest) == (float(info.eps) / 2, float(info.smallest_subnormal))


@pytest.mark.parametrize("dtype", NARROW, ids=lambda dtype: dtype.name)
def test_spacing_is_what_narrowing_keeps(dtype: Dtype, tmp_path: Path) -> None:
    """A step of the spacing survives the way through the file's dtype, and less than half of one does not."""
    for value in (1.0, 3.0, 0.0):
        start = np.array([value], np.float32)
        step = spacing(start, dtype.stored)
        values = np.concatenate([start, start + step, start + np.float32(0.4) * step])
        path = tmp_path / f"{value}.bin"
        path.write_bytes(narrow(values, dtype.stored).tobytes())
        header = TensorHeader("a", dtype.stored, (3,), 0, 3 * dtype.width)
        there = read(WeightsFile(path, 3 * dtype.width, {}, {"a": header}), header)
        assert there.tolist() == [values[0], values[1], values[0]]


def test_the_coarsest_decides() -> None:
    assert coarser("float32", "bfloat16", "float16") == "bfloat16"
    assert coarser("F32", "F16") == "F16"
    assert coarser("float64", "float32") == "float32"
    assert coarser("float32", "") == coarser() == ""
    assert drift("") == max(map(drift, FLOATS))


@pytest.mark.parametrize("judge", [coarser, agrees, drift, floor])
@pytest.mark.parametrize("dtype", ["float7", "int8", "F8_E4M3"])
def test_an_unknown_dtype_is_named(judge: Callable[[str], Any], dtype: str) -> None:
    with pytest.raises(UnknownDtype, match=f"unknown dtype `{dtype}` \\(known: float64, float32"):
        judge(dtype)


def recorded_as(folder: Path, **fields: str) -> Path:
    """A healthy trace whose process recorded another dtype."""
    path = write(folder) / "peft" / "process.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def plain(folder: Path, dtype: str) -> Path:
    """The trace of a merged model on the same tokens."""
    with TraceWriter(folder / "peft", process(dtype=dtype)) as writer:
        writer.score(Score("a", 0, "plain", [1, 2], [3, 4]), np.full((2, 8), -2, np.float32))
    return folder


@pytest.mark.parametrize("field", ["dtype", "lora_dtype"])
def test_a_trace_of_an_unknown_dtype_is_shown_and_not_judged(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, odd = write(tmp_path / "good"), recorded_as(tmp_path / "odd", **{field: "float7\x1b[31m"})
    assert call("show", odd, capsys=capsys)[0] == call("show", good, capsys=capsys)[0]
    for pair in ((good, odd), (odd, good)):
        status, out, err = call("compare", *pair, capsys=capsys)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: `{odd / 'peft' / 'process.json'}` records the unknown dtype `float7\\x1b[31m`")
        assert "\x1b" not in err
    if field == "dtype":
        with pytest.raises(UnreadableFile, match="records the unknown dtype"):
            effect(open_trace(odd), open_trace(plain(tmp_path / "plain", "float32")))
        with pytest.raises(UnreadableFile, match="records the unknown dtype"):
            effect(open_trace(good), open_trace(plain(tmp_path / "odd-plain", "float7")))


def test_a_trace_without_a_dtype_is_judged_as_the_coarsest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, empty = write(tmp_path / "good"), recorded_as(tmp_path / "empty", dtype="")
    assert call("show", empty, capsys=capsys)[0] == call("show", good, capsys=capsys)[0]
    both = compare(open_trace(empty), open_trace(empty))
    assert (both.verdict, both.dtype, both.tolerance) == ("agree", "", drift("bfloat16"))
    assert NOT_RECORDED_NOTE in both.notes
    status, out, _ = call("compare", empty, empty, capsys=capsys)
    assert status == 0
    assert "no dtype recorded" in out
    merged = effect(open_trace(empty), open_trace(plain(tmp_path / "plain", "float32")))
    assert (merged.dtype, merged.tolerance, merged.notes[0]) == ("", drift("bfloat16"), NOT_RECORDED_NOTE)
    # What the other run recorded decides, where there is any.
    one = compare(open_trace(good), open_trace(empty))
    assert (one.dtype, one.notes) == ("float32", ())
