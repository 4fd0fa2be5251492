"""Two traces of one adapter beside each other: where they part, by how much, and why.

In: a reference and a candidate trace. Out: a `Comparison`: rows joined on prompt and position as long as both runs saw
the same tokens, every module with its error and its parts, the answers, both ledgers, and the causes of a difference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora_probe.comparison.adapters import adapter_differences, different_files
from lora_probe.comparison.answers import outputs, repeats
from lora_probe.comparison.causes import causes
from lora_probe.comparison.compared import Comparison, Divergence
from lora_probe.comparison.joined import Joined, by_load, join, matched_requests
from lora_probe.comparison.modules import ModuleDiff, compare_module, own_arithmetic, with_siblings
from lora_probe.comparison.prompts import prompt_differences
from lora_probe.comparison.tolerance import NOT_RECORDED_NOTE, judged_dtype
from lora_probe.comparison.weights import Loads, Relation, compare_files, compare_weights, limits
from lora_probe.errors import ProbeError
from lora_probe.ledger import Fate, Ledger
from lora_probe.names import Key, in_words, natural, one_or_more, path_of
from lora_probe.precision import NOT_RECORDED, agrees, drift
from lora_probe.recording import Floats, Load, Trace


@np.errstate(all="ignore")
def compare_traces(reference: Trace, candidate: Trace, rtol: float | None = None, atol: float = 0.0) -> Comparison:
    """Compare two traces of one adapter each. `rtol` replaces the measured tolerance of contributions; differences up
    to `atol` count as none. Neither excuses other weights.

    Raises:
        ProbeError: the traces have no prompt in common.
        UnreadableFile: a trace records an unknown dtype, or is damaged.
    """
    dtype = _judged_in(reference, candidate)
    limit = drift(dtype) if rtol is None else rtol
    requests = matched_requests(reference, candidate)
    of_base = matched_requests(reference, candidate, of_base=True)
    joined = join(reference, candidate, requests)
    pairs = _pairs_of_loads(reference, candidate, joined)
    loads = _different_first(reference, candidate, pairs)
    weights = compare_weights(reference, candidate, pairs, dtype, joined)
    modules: tuple[ModuleDiff, ...] = ()
    first = None
    if joined is not None:
        arithmetic = _arithmetic(reference, candidate, pairs)
        judge = _Judge(joined, limit, atol, weights.relations, limits(dtype)[1], arithmetic)
        rowless = _without_rows(reference) | _without_rows(candidate)
        modules, first = judge.modules(_fates(reference), _fates(candidate), rowless)
    comparison = Comparison(
        reference,
        candidate,
        (
            _judged(reference, [pair.reference for pair in pairs]),
            _judged(candidate, [pair.candidate for pair in pairs]),
        ),
        dtype,
        limit,
        len(joined.where) if joined is not None else 0,
        modules,
        requests,
        first,
        outputs(reference, candidate, requests, of_base, dtype),
        (repeats(reference), repeats(candidate)),
        measured=rtol is None,
        prompts=prompt_differences(reference, candidate),
        unasked=_unasked(reference, candidate),
        adapters=adapter_differences(reference, candidate, loads, agrees(dtype)) if loads is not None else (),
        files=different_files(loads) if loads is not None else None,
        weights=weights.differences,
    )
    _refuse_unrelated(comparison)
    if comparison.files is not None:
        # What differs in the files differs in the engines too.
        comparison = replace(
            comparison,
            weights=(),
            file_weights=compare_files(reference, candidate, pairs),
            unshared=_unshared(reference, candidate, pairs),
            other_tensors=_other_tensors(reference, candidate, pairs),
        )
    comparison = replace(comparison, estimated=_why_estimated(comparison))
    comparison = replace(comparison, causes=causes(comparison))
    return replace(comparison, notes=tuple(_notes(comparison, joined is not None)))


def _judged_in(reference: Trace, candidate: Trace) -> str:
    """The dtype that decides. That of a server that was asked is not known; a process that was killed may have none."""
    workers = (*reference.workers, *candidate.workers)
    recorded = [(w, name) for w in workers for name in (w.process.dtype, w.process.lora_dtype)]
    return judged_dtype((w, name) for w, name in recorded if name or w.process.engine == "server")


def _refuse_unrelated(comparison: Comparison) -> None:
    """Raises ProbeError: the runs have nothing in common."""
    related = comparison.requests or comparison.prompts or any(comparison.unasked)
    if related or any(ledger.refused for ledger in comparison.ledgers):
        return
    for trace in comparison.traces:
        if not trace.answers:
            hint = "record it again: its requests.jsonl is missing or cut"
            raise ProbeError(f"`{trace.path}` contains no answers", hint)
    one, two = comparison.traces
    raise ProbeError(
        f"`{one.path}` and `{two.path}` have no prompt in common", "record both with the same --prompt options"
    )


def _unasked(reference: Trace, candidate: Trace) -> tuple[int, int]:
    """How many prompts each run answered only without the adapter, though the other one has them with it."""
    asked = [_prompts_of(trace, with_adapter=True) for trace in (reference, candidate)]
    plain = [_prompts_of(trace, with_adapter=False) for trace in (reference, candidate)]
    one, two = ((asked[1 - side] - asked[side]) & plain[side] for side in (0, 1))
    return len(one), len(two)


def _prompts_of(trace: Trace, with_adapter: bool) -> set[tuple[int, ...]]:
    return {tuple(r.prompt_ids) for r in trace.answers if (r.adapter is not None) == with_adapter}


def _pairs_of_loads(reference: Trace, candidate: Trace, joined: Joined | None) -> list[Loads]:
    """The loads that joined rows ran with; without such rows, the newest ones."""
    pairs = [Loads(*loads) for loads, _ in by_load(joined) if min(loads) >= 0] if joined is not None else []
    if pairs or not (reference.loads and candidate.loads):
        return pairs
    return [Loads(reference.loads[-1][0].load, candidate.loads[-1][0].load)]


def _unshared(reference: Trace, candidate: Trace, pairs: list[Loads]) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
    """The modules that only one of the two files has."""
    one: set[Key] = set().union(*(reference.file_fingerprints.get(loads.reference, {}) for loads in pairs))
    two: set[Key] = set().union(*(candidate.file_fingerprints.get(loads.candidate, {}) for loads in pairs))
    if not one or not two:
        # A trace of an older version has none.
        return (), ()
    only = one - two, two - one
    first, second = (tuple(sorted(keys, key=lambda key: natural(path_of(key)))) for keys in only)
    return first, second


def _other_tensors(reference: Trace, candidate: Trace, pairs: list[Loads]) -> tuple[str, ...]:
    """The tensors without a fingerprint that differ between the two files, or are in one alone."""
    names: set[str] = set()
    for loads in pairs:
        one, two = reference.other_tensors.get(loads.reference), candidate.other_tensors.get(loads.candidate)
        if one is not None and two is not None:
            names |= {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
    return tuple(sorted(names, key=natural))


def _different_first(reference: Trace, candidate: Trace, pairs: list[Loads]) -> tuple[Load, Load] | None:
    """The loads that are compared; of several pairs one of different files, if there is any."""
    records = [{load.load: load for load, _ in trace.loads} for trace in (reference, candidate)]
    # Rows of a damaged trace may have loads of which there is no record.
    there = [pair for pair in pairs if pair.reference in records[0] and pair.candidate in records[1]]
    held = [(records[0][pair.reference], records[1][pair.candidate]) for pair in there]
    return next((pair for pair in held if pair[0].digest != pair[1].digest), held[0] if held else None)


def _arithmetic(reference: Trace, candidate: Trace, pairs: list[Loads]) -> dict[str, float]:
    """By the path of a module, how far both engines are from s·x·A·B of their own x and of the file, together. Where a
    slot is not as in the file, that is no arithmetic."""
    errors: dict[str, float] = {}
    for loads in pairs:
        one = own_arithmetic(reference, loads.reference)
        two = own_arithmetic(candidate, loads.candidate)
        for path in one.keys() & two.keys():
            errors[path] = max(errors.get(path, 0.0), float(np.hypot(one[path], two[path])))
    wrong = {
        path_of(row.key)
        for trace in (reference, candidate)
        for _, ledger in trace.loads
        for row in ledger.rows
        if row.stations["placed"].value != "ok"
    }
    return {path: error for path, error in errors.items() if path not in wrong}


def _judged(trace: Trace, compared: Collection[int]) -> Ledger:
    """The worst ledger of the loads that rows ran with and whose file is compared; of the newest load if it was
    refused, or if none ran."""
    if not trace.loads:
        return Ledger(trace.engine, ())
    _, newest = trace.loads[-1]
    digests = {load.digest for load, _ in trace.loads if load.load in compared}
    ledgers = _that_ran(trace, digests)
    if not ledgers or newest.refused:
        ledgers.append(newest)
    # A module that is lost or wrong is worse than one of which nothing is known.
    return max(ledgers, key=lambda one: (one.refused, one.count("lost") + one.count("wrong"), not one.healthy))


def _that_ran(trace: Trace, digests: Collection[str] = ()) -> list[Ledger]:
    """The ledgers of the loads that rows ran with; only of these files, if any are passed."""
    used = set() if trace.rows is None else set(np.unique(trace.rows.load).tolist())
    wanted = [(load, ledger) for load, ledger in trace.loads if not digests or load.digest in digests]
    return [ledger for load, ledger in wanted if load.load in used]


def _notes(comparison: Comparison, joined: bool) -> Iterator[str]:
    for trace in comparison.traces:
        if not trace.complete:
            yield f"{trace.path} is incomplete: {', '.join(trace.unclosed)}"
        if trace.unjoined:
            yield f"the rows in {trace.path} cannot be joined: {trace.unjoined}"
        elif trace.outcomes:
            yield f"{trace.path} is of a server that was asked: nobody sees its layers, so the answers decide"
        elif trace.rows is None:
            yield f"{trace.path} contains no rows"
    if comparison.reference.path == comparison.candidate.path:
        yield "this is one trace, compared with itself"
    yield from _unmatched(comparison)
    if comparison.files is not None and not any(cause.code == "LP625" for cause in comparison.causes):
        one, two = comparison.files
        yield f"the runs loaded different files, in which no difference of weights is known: {one} and {two}"
    asked = any(trace.outcomes for trace in comparison.traces)
    if not joined and not asked and not any(ledger.refused for ledger in comparison.ledgers):
        yield "no rows were compared"
    if comparison.dtype == NOT_RECORDED and comparison.rows:
        yield NOT_RECORDED_NOTE


def _unmatched(comparison: Comparison) -> Iterator[str]:
    """The prompts of the adapter that only one run has."""
    matched = {tuple(request.reference.prompt_ids) for request in comparison.requests}
    prompts = comparison.prompts
    different = {prompt.reference for prompt in prompts}, {prompt.candidate for prompt in prompts}
    for trace, explained, unasked in zip(comparison.traces, different, reversed(comparison.unasked), strict=True):
        own = _prompts_of(trace, with_adapter=True) - matched - explained
        if own and not unasked:
            yield f"only {trace.path} has {one_or_more('more prompt', len(own))}"


def _why_estimated(comparison: Comparison) -> str:
    """Why some errors are not exact; empty if all are."""
    if all(diff.exact for diff in comparison.modules if diff.error is not None):
        return ""
    for trace in comparison.traces:
        if trace.rows is not None and trace.rows.shrink is None:
            return f"{trace.path} did not keep shrink"
    if comparison.adapters or comparison.file_weights:
        return "the adapters differ"
    workers = [worker.process for trace in comparison.traces for worker in trace.workers]
    dtypes = dict.fromkeys(process.lora_dtype or process.dtype for process in workers)
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


@dataclass(frozen=True)
class _Judge:
    """Judges the modules of joined rows by `limit` and `atol`: `relations` of their weights, which are the same up to
    `rounded`, and the `arithmetic` of both engines."""

    joined: Joined
    limit: float
    atol: float
    relations: Mapping[Loads, Mapping[Key, Relation]]
    rounded: float
    arithmetic: Mapping[str, float]

    def modules(
        self, one: dict[Key, set[Fate]], two: dict[Key, set[Fate]], rowless: set[Key]
    ) -> tuple[tuple[ModuleDiff, ...], Divergence | None]:
        """Every module, and the first row that exceeds the tolerance. `one` and `two` are the fates in both runs."""
        here, there = set(self.joined.reference.modules), set(self.joined.candidate.modules)
        diffs: list[ModuleDiff] = []
        errors: dict[Key, Floats] = {}
        for key in sorted(one.keys() | two.keys(), key=lambda key: natural(key[0])):
            if key in here and key in there:
                arithmetic = self.arithmetic.get(path_of(key))
                diff, row_errors = compare_module(
                    self.joined, key, (self.limit, self.atol), self.relations, arithmetic, self.rounded
                )
                diffs.append(diff)
                if diff.status == "differs":
                    errors[key] = row_errors
            elif (key in here or key in there) and not self._followed(key, (one, two), rowless):
                diffs.append(ModuleDiff(key, "only in reference" if key in here else "only in candidate"))
        return with_siblings(diffs, self.limit), _first(self.joined, errors, self.limit)

    def _followed(self, key: Key, fates: tuple[dict[Key, set[Fate]], ...], rowless: set[Key]) -> bool:
        """Whether the other engine may have the module and no rows of it: its ledger reports what became of it."""
        return key in rowless or any("unknown" in of_run.get(key, ()) for of_run in fates)


def _first(joined: Joined, errors: Mapping[Key, Floats], limit: float) -> Divergence | None:
    """The first row beyond the tolerance in a module that differs: by the order of tokens, then of modules."""
    firsts = [(int(beyond.argmax()), key) for key, of_rows in errors.items() if (beyond := of_rows > limit).any()]
    if not firsts:
        return None
    # Of several modules at that row the first: `errors` is in their order.
    row, key = min(firsts, key=lambda first: first[0])
    prompt, position, token = joined.where[row]
    return Divergence(prompt, position, token, key, float(errors[key][row]))
