"""The first divergence of two traces, and how large it is.

In: a reference and a candidate trace. Out: a `Comparison`: rows joined on prompt and position as long as both runs saw
the same tokens, the relative error of the contribution for every module, and both ledgers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_probe.comparison.adapters import AdapterDifference, adapter_differences, different_files
from lora_probe.comparison.joined import Joined, RequestDiff, by_load, distances, join, matched_requests
from lora_probe.comparison.placed_weights import WeightDifference, weight_differences
from lora_probe.comparison.tolerance import NOT_RECORDED_NOTE, judged_dtype
from lora_probe.errors import ProbeError
from lora_probe.ledger import Fate, Ledger
from lora_probe.names import Key, in_words, natural
from lora_probe.precision import NOT_RECORDED, ROW_SLACK, agrees, drift
from lora_probe.recording import Floats, Trace

Verdict = Literal["agree", "differ", "undecided"]
Status = Literal["ok", "differs", "only in reference", "only in candidate"]


@dataclass(frozen=True)
class ModuleDiff:
    """One module in both runs. `error` is ‖Δdelta‖ / ‖delta‖ over all joined rows (each load relative to its own
    ‖delta‖, so that a strong adapter does not hide a weak one); `worst_row` is that of one row. `exact`: Δdelta was
    computed from equal B or from the deltas themselves; otherwise it is a bound from norms."""

    key: Key
    status: Status
    error: float | None = None
    worst_row: float | None = None
    worst_at: tuple[int, int] | None = None
    exact: bool = True
    strength: tuple[float | None, float | None] = (None, None)

    @property
    def module(self) -> str:
        return self.key[0]


@dataclass(frozen=True)
class Divergence:
    """The first row and module, in the order of computation, that exceeds the tolerance."""

    prompt: int
    position: int
    token: int
    key: Key
    error: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`. Errors are relative to the reference. `adapters` is what is known to differ between the
    two adapters, and `weights` between the weights that the runs of one adapter multiply with; `estimated` is why some
    errors are estimates (those that are not `exact`), empty if none is."""

    reference: Trace
    candidate: Trace
    ledgers: tuple[Ledger, Ledger]
    dtype: str
    tolerance: float
    rows: int
    modules: tuple[ModuleDiff, ...]
    requests: tuple[RequestDiff, ...]
    first: Divergence | None
    notes: tuple[str, ...]
    adapters: tuple[AdapterDifference, ...] = ()
    estimated: str = ""
    weights: tuple[WeightDifference, ...] = ()

    @property
    def worst(self) -> ModuleDiff | None:
        measured = [module for module in self.modules if module.error is not None]
        return max(measured, key=lambda module: module.error or 0.0, default=None)

    @property
    def verdict(self) -> Verdict:
        diverged = any(not request.equal for request in self.requests) and self.dtype == "float32"
        if diverged or self.adapters or self.weights or any(module.status != "ok" for module in self.modules):
            return "differ"
        if any(ledger.refused or ledger.count("lost") or ledger.count("wrong") for ledger in self.ledgers):
            return "differ"
        if self.reference.request_findings or self.candidate.request_findings:
            return "differ"
        judged = self.rows > 0 and all(ledger.healthy for ledger in self.ledgers)
        return "agree" if judged and self.reference.complete and self.candidate.complete else "undecided"


def compare_traces(reference: Trace, candidate: Trace, rtol: float | None = None) -> Comparison:
    """Compare two traces of one adapter each.

    Raises:
        ProbeError: the traces have no prompt in common.
        UnreadableFile: a trace records an unknown dtype.
    """
    ledgers = _judged(reference), _judged(candidate)
    workers = (*reference.workers, *candidate.workers)
    dtype = judged_dtype((w, name) for w in workers for name in (w.process.dtype, w.process.lora_dtype) if name)
    limit = drift(dtype) if rtol is None else rtol
    requests = matched_requests(reference, candidate)
    refused = [ledger for ledger in ledgers if ledger.refused]
    if not requests and not refused:
        raise ProbeError(
            f"`{reference.path}` and `{candidate.path}` have no prompt in common",
            "record both with the same --prompt options",
        )
    joined = join(reference, candidate, requests)
    modules: tuple[ModuleDiff, ...] = ()
    first, count = None, 0
    if joined is not None:
        rowless = _without_rows(reference) | _without_rows(candidate)
        modules, first = _modules(joined, _fates(reference), _fates(candidate), limit=limit, rowless=rowless)
        count = len(joined.where)
    adapters = adapter_differences(reference, candidate, agrees(dtype))
    weights: tuple[WeightDifference, ...] = ()
    if joined is not None and not different_files(reference, candidate):
        weights = weight_differences(joined, reference.modules, dtype, rtol)
    notes = tuple(_notes(reference, candidate, joined is not None or bool(refused), adapters))
    if dtype == NOT_RECORDED:
        notes = (*notes, NOT_RECORDED_NOTE)
    why = _why_estimated(reference, candidate, modules, bool(adapters))
    return Comparison(
        reference, candidate, ledgers, dtype, limit, count, modules, requests, first, notes, adapters, why, weights
    )


def _judged(trace: Trace) -> Ledger:
    """The worst ledger of the loads that rows ran with; of the newest load if it was refused, or if none ran."""
    _, newest = trace.loads[-1]
    ledgers = _that_ran(trace)
    if not ledgers or newest.refused:
        ledgers.append(newest)
    # A module that is lost or wrong is worse than one of which nothing is known.
    return max(ledgers, key=lambda one: (one.refused, one.count("lost") + one.count("wrong"), not one.healthy))


def _that_ran(trace: Trace) -> list[Ledger]:
    """The ledgers of the loads that rows ran with."""
    used = set() if trace.rows is None else set(np.unique(trace.rows.load).tolist())
    return [ledger for load, ledger in trace.loads if load.load in used]


def _notes(
    reference: Trace, candidate: Trace, compared: bool, adapters: tuple[AdapterDifference, ...]
) -> Iterator[str]:
    for trace in (reference, candidate):
        if not trace.complete:
            yield f"{trace.path} is incomplete: {', '.join(trace.unclosed)}"
        if trace.unjoined:
            yield f"the rows in {trace.path} cannot be joined: {trace.unjoined}"
        elif trace.rows is None:
            yield f"{trace.path} contains no rows"
        for finding in trace.request_findings:
            yield f"{trace.path}: {finding.message} ({finding.code})"
    if (paths := different_files(reference, candidate)) is not None:
        what = "different adapters" if adapters else "different files"
        yield f"the runs loaded {what}: {paths[0]} and {paths[1]}"
        if not adapters:
            yield "no difference in rank, scaling or ‖B·A‖ of a module is recorded"
    for difference in adapters:
        yield f"the adapters differ: {difference.text}"
    if not compared:
        yield "no rows were compared, only the ledgers and the answers"


def _why_estimated(
    reference: Trace, candidate: Trace, modules: tuple[ModuleDiff, ...], different_adapters: bool
) -> str:
    """Why some errors are not exact; empty if all are."""
    if all(diff.exact for diff in modules if diff.error is not None):
        return ""
    for trace in (reference, candidate):
        if trace.rows is not None and trace.rows.shrink is None:
            return f"{trace.path} did not keep shrink"
    if different_adapters:
        return "the adapters differ"
    dtypes = dict.fromkeys(w.process.lora_dtype or w.process.dtype for t in (reference, candidate) for w in t.workers)
    if len(dtypes) > 1:
        return f"B is rounded differently in {in_words(list(dtypes))}"
    return "the weights in the engines are not known to be the same"


def _fates(trace: Trace) -> dict[Key, set[Fate]]:
    """The fates of each module in the loads of a trace."""
    fates: dict[Key, set[Fate]] = {}
    for _, ledger in trace.loads:
        for row in ledger.rows:
            fates.setdefault(row.key, set()).add(row.fate)
    return fates


def _without_rows(trace: Trace) -> set[Key]:
    """The modules that a trace follows without rows, such as heads and experts: those that took effect in a load of
    which other modules have rows."""
    if trace.rows is None:
        return set()
    followed = {row.key for ledger in _that_ran(trace) for row in ledger.rows if row.fate == "took effect"}
    return followed - set(trace.rows.modules)


def _modules(
    joined: Joined, *fates: dict[Key, set[Fate]], limit: float, rowless: set[Key]
) -> tuple[tuple[ModuleDiff, ...], Divergence | None]:
    columns = [{key: n for n, key in enumerate(rows.modules)} for rows in (joined.reference, joined.candidate)]
    expected = fates[0].keys() | fates[1].keys()
    diffs: list[ModuleDiff] = []
    errors: dict[Key, Floats] = {}
    for key in sorted(expected, key=lambda k: natural(k[0])):
        here, there = columns[0].get(key), columns[1].get(key)
        if here is None and there is None:
            continue
        if here is None or there is None:
            if any("unknown" in of_trace.get(key, ()) for of_trace in fates) or key in rowless:
                # The other engine has the module and no rows of it; its ledger reports what became of it.
                continue
            status: Status = "only in candidate" if here is None else "only in reference"
            diffs.append(ModuleDiff(key, status))
            continue
        diff, row_errors = _module(joined, key, here, there, limit)
        diffs.append(diff)
        if diff.status == "differs":
            errors[key] = row_errors
    return tuple(diffs), _first(joined, errors, limit)


def _module(joined: Joined, key: Key, here: int, there: int, limit: float) -> tuple[ModuleDiff, Floats]:
    """One module: its error over all rows against `limit`, and its worst row against `limit` times ROW_SLACK.

    The error of a row is relative to its load's usual row at the module, as a single row may be almost zero. It is
    infinite if the row is NaN in one run only; rows that are NaN in both runs are left to the ledgers.
    """
    one, two = joined.reference, joined.candidate
    norm_one, norm_two = one.delta_norm[joined.reference_rows, here], two.delta_norm[joined.candidate_rows, there]
    distance, exact = distances(joined, here, there)
    measured = np.isfinite(norm_one) | np.isfinite(norm_two)
    distance = np.where(measured & ~np.isfinite(distance), np.float32(np.inf), distance)
    usual = np.ones(len(distance))
    for _, chosen in by_load(joined):
        total = float(np.sqrt(np.nansum(np.square(norm_one[chosen], dtype=np.float64))))
        usual[chosen] = total / np.sqrt(max(int(np.isfinite(norm_one[chosen]).sum()), 1)) or 1.0
    row_errors = np.where(measured, distance / usual, 0).astype(np.float32)
    error = float(np.sqrt(np.mean(np.square(row_errors, dtype=np.float64))))
    at = int(row_errors.argmax())
    worst = float(row_errors[at])
    strength = tuple(
        _strength(norm, rows.base_norm[numbers, column])
        for norm, rows, numbers, column in (
            (norm_one, one, joined.reference_rows, here),
            (norm_two, two, joined.candidate_rows, there),
        )
    )
    status: Status = "ok" if error <= limit and worst <= ROW_SLACK * limit else "differs"
    diff = ModuleDiff(key, status, error, worst, joined.where[at][:2], exact, strength)  # type: ignore[arg-type]
    return diff, row_errors


def _strength(delta: Floats, base: Floats) -> float | None:
    """sqrt(Σ‖delta‖²) / sqrt(Σ‖base‖²)."""
    below = float(np.sqrt(np.nansum(np.square(base, dtype=np.float64))))
    return float(np.sqrt(np.nansum(np.square(delta, dtype=np.float64)))) / below if below else None


def _first(joined: Joined, errors: Mapping[Key, Floats], limit: float) -> Divergence | None:
    """The first row beyond the tolerance in a module that differs: by the order of tokens, then of modules."""
    if not errors:
        return None
    keys = list(errors)
    table = np.stack([errors[key] for key in keys], axis=1)
    row, column = (int(number) for number in np.argwhere(table > limit)[0])
    prompt, position, token = joined.where[row]
    return Divergence(prompt, position, token, keys[column], float(table[row, column]))
