"""The rows of many segments as one, a segment at a time: what is in memory is the result and one segment.

In: `Rows` one after the other, and how many there are and how wide their columns become. Out: one `Rows` with the
columns of all. Modules that a part does not have, and columns that it did not keep, are NaN in its rows; shrinks of a
smaller rank are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_probe.names import Key
from lora_probe.recording.records import Served
from lora_probe.recording.rows import COLUMNS, TABLES, Rows

_DTYPES = {"F32": np.float32, "I32": np.int32, "I8": np.int8}


def stacked(parts: Iterable[Rows], keys: tuple[Key, ...], count: int, widths: Mapping[str, int]) -> Rows:
    """`count` rows with columns for `keys`. `widths`: the columns that any part has, with the length of their last axis
    where it is not that of the modules. The weights of the loads are left out."""
    numbers = {key: number for number, key in enumerate(keys)}
    columns: dict[str, Any] = {name: _empty(name, count, len(keys), widths[name]) for name in widths}
    tables: dict[str, Any] = {}
    requests: dict[str, int] = {}
    served: dict[str, Served] = {}
    begin = 0
    for part in parts:
        rows = slice(begin, begin + len(part))
        where = np.array([numbers[key] for key in part.modules], np.intp)
        for name, column in columns.items():
            if (values := getattr(part, name)) is not None and name != "request":
                _fill(column, rows, values, where, name)
        table = [requests.setdefault(request, len(requests)) for request in part.requests]
        columns["request"][rows] = np.array(table, np.int32)[part.request] if table else part.request
        for name in TABLES:
            for key, values in (getattr(part, name) or {}).items():
                of_key = tables.setdefault(name, {})
                if key not in of_key:
                    of_key[key] = np.full((count, values.shape[1]), np.nan, np.float32)
                of_key[key][rows] = values
        served |= part.served
        begin += len(part)
    return Rows(modules=keys, requests=tuple(requests), served=served, **columns, **tables)


def _empty(name: str, count: int, modules: int, width: int) -> Any:
    column = COLUMNS[name]
    lengths = {"rows": count, "modules": modules}
    dtype = _DTYPES[column.dtype]
    filling = np.nan if dtype is np.float32 else -1
    return np.full([lengths.get(axis, width) for axis in column.axes], filling, dtype)


def _fill(column: Any, rows: slice, values: Any, where: np.ndarray[Any, np.dtype[np.intp]], name: str) -> None:
    axes = COLUMNS[name].axes
    if "modules" not in axes:
        column[rows] = values
        return
    target = column[rows]
    if "r" not in axes:
        target[:, where] = values
        return
    width = values.shape[-1]
    padded = np.full((*values.shape[:2], target.shape[-1]), 0 if width else np.nan, np.float32)
    padded[..., :width] = values
    target[:, where] = padded
