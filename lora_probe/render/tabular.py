"""Tables from the JSON of a command: as columns for Python, and as CSV.

In: a dictionary as `--format json` prints it. Out: its lists of objects as columns, one list of objects as CSV. Values
that are lists or objects themselves are left out.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.render.cells import one_line

Columns = dict[str, npt.NDArray[Any]]
Records = Sequence[Mapping[str, Any]]

FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
"""How a text begins that a spreadsheet would run as a formula."""


def tables_of(data: Mapping[str, Any]) -> dict[str, Columns]:
    """Every list of objects in `data` as columns, by its name; of nested ones by its path: `ledger.vllm.modules`."""
    found: dict[str, Columns] = {}
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", data)]
    while waiting:
        prefix, values = waiting.pop(0)
        for name, value in values.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict):
                waiting.append((f"{path}.", value))
            elif isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
                found[path] = columns_of(value)
    return found


def columns_of(records: Records) -> Columns:
    """Records with the same fields as columns, in the order of their fields."""
    return {name: _column([record.get(name) for record in records]) for name in _plain_names(records)}


def _plain_names(records: Records) -> list[str]:
    """The fields that are nowhere a list or an object, in their order."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if all(_is_plain(record.get(name)) for record in records)]


def _is_plain(value: Any) -> bool:
    return not isinstance(value, list | tuple | dict)


def _column(values: list[Any]) -> npt.NDArray[Any]:
    """One column. Numbers with gaps are floats, and NaN where there is none."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool} and None not in values:
        return np.array(values, np.bool_)
    if kinds == {int} and None not in values and all(-(2**63) <= value < 2**63 for value in values):
        return np.array(values, np.int64)
    if kinds and kinds <= {int, float}:
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return np.array(values, object)


def as_csv(records: Records) -> str:
    """Records as CSV with a header. A text that begins like a formula gets an apostrophe, as spreadsheets do it."""
    columns = _plain_names(records)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        writer.writerow([_cell(record.get(name)) for name in columns])
    return stream.getvalue().removesuffix("\n")


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if value is None else value
    text = one_line(value)
    return f"'{text}" if text.startswith(FORMULA) else text
