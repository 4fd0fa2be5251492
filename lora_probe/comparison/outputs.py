"""The first divergence inside a merged model: the first module whose output differs from the unmerged run, and how
far each module's output is from it.

In: two traces with sketches of the outputs of the same modules, and the passes that belong together. Out: a
`FirstModule`, and a `ModuleOutput` for each module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.names import Key, natural
from lora_probe.precision import ROW_SLACK
from lora_probe.recording import Rows, Score, Trace
from lora_probe.recording.rows import places

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FirstModule:
    """The first row and module whose output differs from the unmerged run's by more than round-off explains.

    `token` is the index in the answer of this row's input token (negative in the prompt); `error` is
    ‖output_merged − output_unmerged‖ of the row, relative to the module's usual output.
    """

    key: Key
    prompt: int
    position: int
    token: int
    error: float


@dataclass(frozen=True)
class ModuleOutput:
    """One module in both runs: `error` is the root mean square over all rows, relative as in `FirstModule`."""

    key: Key
    error: float


def compare_outputs(
    unmerged: Trace, merged: Trace, pairs: Sequence[tuple[Score, Score]], limit: float, notes: list[str]
) -> tuple[FirstModule | None, tuple[ModuleOutput, ...]]:
    """The first row and module beyond the tolerance, by the order of tokens, then of modules; and all modules in order.

    The distance of two outputs is that of their sketches, relative to the module's usual output in the unmerged run.
    """
    rows = []
    for trace in (unmerged, merged):
        if len(trace.workers) > 1:
            notes.append(f"{trace.path} contains shards of {len(trace.workers)} workers, so modules cannot be compared")
        elif trace.rows is None or trace.rows.sketch is None:
            notes.append(f"{trace.path} contains no outputs of modules")
        else:
            rows.append(trace.rows)
    if len(rows) != 2:
        return None, ()
    one, two = rows
    missing = len(set(one.modules) ^ set(two.modules))
    if missing:
        notes.append(f"{missing} modules were recorded in only one of the two runs")
    unmerged_rows, merged_rows, where = _joined(one, two, pairs)
    keys = sorted(set(one.modules) & set(two.modules), key=lambda key: natural(key[0]))
    if not where or not keys:
        notes.append("no module was recorded on the same rows of both runs")
        return None, ()
    table = np.stack([_row_errors(one, two, unmerged_rows, merged_rows, key) for key in keys], axis=1)
    errors = np.sqrt(np.mean(np.square(table), axis=0))
    differ = (errors > limit) | (table.max(axis=0) > ROW_SLACK * limit)
    first = None
    if differ.any():
        row, column = (int(number) for number in np.argwhere((table > limit) & differ)[0])
        prompt, position, token = where[row]
        first = FirstModule(keys[column], prompt, position, token, float(table[row, column]))
    return first, tuple(ModuleOutput(key, float(error)) for key, error in zip(keys, errors, strict=True))


def _joined(
    one: Rows, two: Rows, pairs: Sequence[tuple[Score, Score]]
) -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
    """Row numbers of both runs that belong together, and (prompt, position, token) of each."""
    here, there = places(one), places(two)
    unmerged_rows, merged_rows, where = [], [], []
    for a, b in pairs:
        begin = len(a.prompt_ids)
        for position in range(begin + len(a.answer_ids) - 1):
            rows = here.get((a.request, position)), there.get((b.request, position))
            if rows[0] is not None and rows[1] is not None:
                unmerged_rows.append(rows[0])
                merged_rows.append(rows[1])
                where.append((a.prompt, position, position - begin))
    return unmerged_rows, merged_rows, where


def _row_errors(one: Rows, two: Rows, unmerged_rows: list[int], merged_rows: list[int], key: Key) -> Doubles:
    """`[rows]` for one module. The error is infinite if a row is NaN in one run only, and 0 if it is NaN in both."""
    here, there = one.modules.index(key), two.modules.index(key)
    assert one.sketch is not None
    assert two.sketch is not None
    sketches = one.sketch[unmerged_rows, here].astype(np.float64), two.sketch[merged_rows, there].astype(np.float64)
    numbers = [np.isfinite(sketch).all(-1) for sketch in sketches]
    norm = one.output_norm[unmerged_rows, here].astype(np.float64)
    usual = float(np.sqrt(np.mean(np.square(norm[numbers[0]])))) if numbers[0].any() else 0.0
    with np.errstate(invalid="ignore"):
        distance = np.linalg.norm(sketches[1] - sketches[0], axis=-1) / (usual or 1.0)
    result: Doubles = np.where(numbers[0] & numbers[1], distance, np.where(numbers[0] | numbers[1], np.inf, 0.0))
    return result
