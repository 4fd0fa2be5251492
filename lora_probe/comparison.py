"""Two traces held against each other: where do they first part, and by how much.

In: a reference and a candidate trace. Out: a `Comparison`: rows joined on prompt and position as far as both runs saw
the same tokens, the relative error of the contribution for every module, and both ledgers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_probe.adapter import Key, natural
from lora_probe.errors import ProbeError
from lora_probe.ledger import Ledger
from lora_probe.precision import ROUND_OFF, drift
from lora_probe.reading import Trace
from lora_probe.tracefile import Floats, RequestRecord, Rows

Verdict = Literal["agree", "differ", "undecided"]
Status = Literal["ok", "differs", "only in reference", "only in candidate"]


@dataclass(frozen=True)
class ModuleDiff:
    """One module in both runs. `error` is ‖Δdelta‖ / ‖delta‖ over all joined rows; `exact` says whether Δdelta was
    computed from equal B or from the deltas themselves, or bounded from norms."""

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
class RequestDiff:
    """One prompt in both runs: how many tokens of the answer are the same, and the logprobs on them."""

    prompt: int
    same_prompt: bool
    output_tokens: tuple[int, int]
    same_tokens: int
    logprob_error: float | None

    @property
    def equal(self) -> bool:
        return self.same_prompt and self.output_tokens[0] == self.output_tokens[1] == self.same_tokens


@dataclass(frozen=True)
class Divergence:
    """The first row and module, in the order in which a model computes them, that lies beyond the tolerance."""

    prompt: int
    position: int
    token: int
    key: Key
    error: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Errors are relative to the reference."""

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

    @property
    def worst(self) -> ModuleDiff | None:
        measured = [module for module in self.modules if module.error is not None]
        return max(measured, key=lambda module: module.error or 0.0, default=None)

    @property
    def verdict(self) -> Verdict:
        parted = any(not request.equal for request in self.requests) and self.dtype == "float32"
        if parted or any(module.status != "ok" for module in self.modules):
            return "differ"
        if not all(ledger.healthy for ledger in self.ledgers):
            return "differ"
        return "agree" if self.reference.complete and self.candidate.complete else "undecided"


def compare(reference: Trace, candidate: Trace, rtol: float | None = None) -> Comparison:
    """Compare two traces of the same adapter.

    Raises:
        ProbeError: nothing is comparable: no load of an adapter on one side, or no prompt in common.
    """
    ledgers = _ledger(reference), _ledger(candidate)
    dtype = max(
        (p.process.dtype for trace in (reference, candidate) for p in trace.workers),
        key=lambda name: ROUND_OFF.get(name, 0.0),
    )
    limit = drift(dtype) if rtol is None else rtol
    requests, spans = _requests(reference, candidate)
    refused = [ledger for ledger in ledgers if ledger.refused]
    if not requests and not refused:
        raise ProbeError(
            f"`{reference.path}` and `{candidate.path}` have no prompt in common",
            "record both with the same --prompt options",
        )
    notes = [
        f"{trace.path} is not complete: {', '.join(trace.unclosed)}"
        for trace in (reference, candidate)
        if not trace.complete
    ]
    joined = _join(reference, candidate, spans)
    modules: tuple[ModuleDiff, ...] = ()
    first, count = None, 0
    if joined is not None:
        modules, first = _modules(joined, ledgers, limit)
        count = len(joined.where)
    elif not refused:
        notes.append("one of the traces holds no rows: only the ledgers and the answers are compared")
    return Comparison(reference, candidate, ledgers, dtype, limit, count, modules, requests, first, tuple(notes))


def _ledger(trace: Trace) -> Ledger:
    if not trace.loads:
        raise ProbeError(
            f"`{trace.path}` records no load of an adapter", "trace an adapter first; see `lora-probe show`"
        )
    return trace.loads[0][1]


def _requests(
    reference: Trace, candidate: Trace
) -> tuple[tuple[RequestDiff, ...], dict[int, tuple[str, str, int, int]]]:
    """The prompts asked with the adapter in both; for each the request ids, the common span and the prompt's length."""
    mine, theirs = (
        {request.prompt: request for request in trace.requests if request.adapter is not None}
        for trace in (reference, candidate)
    )
    diffs, spans = [], {}
    for prompt in sorted(mine.keys() & theirs.keys()):
        one, two = mine[prompt], theirs[prompt]
        same_prompt = one.prompt_ids == two.prompt_ids
        same = _common(one.output_ids, two.output_ids) if same_prompt else 0
        both = zip(one.logprobs[:same], two.logprobs[:same], strict=False)
        errors = [abs(a - b) for a, b in both if a is not None and b is not None]
        diffs.append(
            RequestDiff(
                prompt, same_prompt, (len(one.output_ids), len(two.output_ids)), same, max(errors, default=None)
            )
        )
        span = _common(_sequence(one), _sequence(two))
        if span:
            spans[prompt] = one.id, two.id, span, len(one.prompt_ids)
    return tuple(diffs), spans


def _sequence(request: RequestRecord) -> list[int]:
    return request.prompt_ids + request.output_ids


def _common(one: list[int], two: list[int]) -> int:
    """The length of the common beginning."""
    count = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        count += 1
    return count


@dataclass(frozen=True)
class _Joined:
    """Row numbers of both traces that belong together. `where`: (prompt, position, number of the token)."""

    reference: Rows
    candidate: Rows
    mine: list[int]
    theirs: list[int]
    where: list[tuple[int, int, int]]


def _join(reference: Trace, candidate: Trace, spans: Mapping[int, tuple[str, str, int, int]]) -> _Joined | None:
    one, two = reference.rows, candidate.rows
    if one is None or two is None:
        return None
    places = _places(one), _places(two)
    mine, theirs, where = [], [], []
    for prompt, (first, second, span, begin) in spans.items():
        for position in range(span):
            a, b = places[0].get((first, position)), places[1].get((second, position))
            if a is not None and b is not None:
                mine.append(a)
                theirs.append(b)
                where.append((prompt, position, position - begin))
    return _Joined(one, two, mine, theirs, where) if mine else None


def _places(rows: Rows) -> dict[tuple[str, int], int]:
    """Row numbers by request and position; of a row that was computed twice the last wins."""
    names = [rows.requests[number] for number in rows.request]
    return {at: number for number, at in enumerate(zip(names, rows.position.tolist(), strict=True))}


def _modules(
    joined: _Joined, ledgers: tuple[Ledger, Ledger], limit: float
) -> tuple[tuple[ModuleDiff, ...], Divergence | None]:
    columns = [{key: n for n, key in enumerate(rows.modules)} for rows in (joined.reference, joined.candidate)]
    fates = [{row.key: row.fate for row in ledger.rows} for ledger in ledgers]
    diffs: list[ModuleDiff] = []
    errors: dict[Key, Floats] = {}
    for key in sorted(fates[0].keys() | fates[1].keys(), key=lambda k: natural(k[0])):
        here, there = columns[0].get(key), columns[1].get(key)
        if here is None and there is None:
            continue
        if here is None or there is None:
            status: Status = "only in candidate" if here is None else "only in reference"
            diffs.append(ModuleDiff(key, status))
            continue
        diff, row_errors = _module(joined, key, here, there, limit)
        diffs.append(diff)
        errors[key] = row_errors
    return tuple(diffs), _first(joined, errors, limit)


def _module(joined: _Joined, key: Key, here: int, there: int, limit: float) -> tuple[ModuleDiff, Floats]:
    one, two = joined.reference, joined.candidate
    norm_one, norm_two = one.delta_norm[joined.mine, here], two.delta_norm[joined.theirs, there]
    distance, exact = _distance(joined, here, there)
    total = float(np.sqrt(np.nansum(np.square(norm_one, dtype=np.float64))))
    error = (
        float(np.sqrt(np.nansum(np.square(distance, dtype=np.float64)))) / total
        if total
        else float(np.nanmax(distance))
    )
    # A row is judged against the module's usual row: a row of almost nothing says nothing.
    usual = total / np.sqrt(max(len(norm_one), 1)) or 1.0
    row_errors = (distance / usual).astype(np.float32)
    at = int(np.nanargmax(row_errors)) if np.isfinite(row_errors).any() else 0
    strength = tuple(
        _strength(norm, rows.base_norm[numbers, column])
        for norm, rows, numbers, column in ((norm_one, one, joined.mine, here), (norm_two, two, joined.theirs, there))
    )
    status: Status = "ok" if error <= limit else "differs"
    prompt, position, _ = joined.where[at]
    diff = ModuleDiff(key, status, error, float(row_errors[at]), (prompt, position), exact, strength)  # type: ignore[arg-type]
    return diff, row_errors


def _distance(joined: _Joined, here: int, there: int) -> tuple[Floats, bool]:
    """‖delta_candidate − delta_reference‖ of each joined row, and whether it is exact.

    With the same placed B: `d·G·dᵀ` with d the difference of the shrinks. With another B: the part that the shrinks
    explain, plus the difference of the norms that the two B give to the candidate's shrink (a lower bound).
    """
    one, two = joined.reference, joined.candidate
    name = "delta/{}"
    if one.tensors and two.tensors and name.format(here) in one.tensors and name.format(there) in two.tensors:
        deltas = one.tensors[name.format(here)][joined.mine], two.tensors[name.format(there)][joined.theirs]
        if deltas[0].shape == deltas[1].shape:
            return np.linalg.norm(deltas[1] - deltas[0], axis=-1), True
    if one.shrink is None or two.shrink is None or one.gram is None or two.gram is None:
        norms = one.delta_norm[joined.mine, here], two.delta_norm[joined.theirs, there]
        return np.abs(norms[1] - norms[0]), False
    rank = min(one.shrink.shape[-1], two.shrink.shape[-1])
    mine, theirs = one.shrink[joined.mine, here, :rank], two.shrink[joined.theirs, there, :rank]
    g_one, g_two = one.gram[here, :rank, :rank], two.gram[there, :rank, :rank]
    difference = theirs - mine
    from_shrink = np.sqrt(((difference @ g_one) * difference).sum(-1).clip(0))
    if one.placed and two.placed and one.placed[here] == two.placed[there] != "":
        return from_shrink, True
    norm_by = [np.sqrt(((theirs @ g) * theirs).sum(-1).clip(0)) for g in (g_one, g_two)]
    result: Floats = from_shrink + np.abs(norm_by[1] - norm_by[0])
    return result, False


def _strength(delta: Floats, base: Floats) -> float | None:
    """sqrt(Σ‖delta‖²) / sqrt(Σ‖base‖²)."""
    below = float(np.sqrt(np.nansum(np.square(base, dtype=np.float64))))
    return float(np.sqrt(np.nansum(np.square(delta, dtype=np.float64)))) / below if below else None


def _first(joined: _Joined, errors: Mapping[Key, Floats], limit: float) -> Divergence | None:
    """Rows in the order of the tokens, modules in the order of the layers."""
    if not errors:
        return None
    keys = list(errors)
    table = np.stack([errors[key] for key in keys], axis=1)
    beyond = np.argwhere(~(table <= limit))
    if not len(beyond):
        return None
    row, column = (int(number) for number in beyond[0])
    prompt, position, token = joined.where[row]
    return Divergence(prompt, position, token, keys[column], float(table[row, column]))
