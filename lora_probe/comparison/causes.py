"""Why two runs differ: the causes that the traces prove, the most likely one first.

In: a `Comparison`. Out: a `Cause` for each: a rule, one sentence, the modules, the evidence and the cure. Causes that
explain others come before them: an adapter that was not requested before weights, weights before the layers behind
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lora_probe.comparison.bases import different_tensors, has_own_head, reasons
from lora_probe.comparison.compared import SIDES, Cause, Comparison, Side
from lora_probe.comparison.weights import WeightDifference
from lora_probe.ledger import Finding, Ledger, clauses
from lora_probe.names import Key, in_words, name_modules, path_of
from lora_probe.precision import logprob_drift
from lora_probe.recording import Trace
from lora_probe.rules import rule_of
from lora_probe.rules.lp6_comparing import (
    different_bases,
    different_files,
    different_prompts,
    not_deterministic,
    not_requested,
    other_weights_in_use,
    unexplained_difference,
    weights_at_another_scale,
    weights_of_another_adapter,
    weights_of_another_module,
)

MOST_NAMED = 5
"""Most tensors that one message names."""


def causes(comparison: Comparison) -> tuple[Cause, ...]:
    """The causes of a difference; none if the runs agree."""
    steps: tuple[Callable[[Comparison], Iterator[Cause]], ...] = (
        _refused,
        _of_servers,
        _unsteady,
        _prompts,
        _unasked,
        _other_slots,
        _lost,
        _files,
        _weights,
        _contaminated,
        _wrong,
        _bases,
    )
    every = [cause for step in steps for cause in step(comparison)]
    if not every and comparison.differs:
        every = list(_unexplained(comparison))
    return tuple(_merged(every))


def _under(finding: Finding, **more: Any) -> Cause:
    return _named(finding.code, finding.message, finding.hint, **more)


def _named(code: str, message: str, hint: str = "", **more: Any) -> Cause:
    """A cause under a rule. A trace of a newer version may have others."""
    rule = rule_of(code, "wrong")
    return Cause(rule.code, rule.name, message, hint or rule.hint, **more)


def _merged(every: Sequence[Cause]) -> Iterator[Cause]:
    """The same cause in both runs, as a name that no engine has, is one cause."""
    taken: set[int] = set()
    for number, cause in enumerate(every):
        if number in taken:
            continue
        for later, other in enumerate(every[number + 1 :], start=number + 1):
            same = (other.code, other.message, other.modules) == (cause.code, cause.message, cause.modules)
            if same and {cause.side, other.side} == {"reference", "candidate"}:
                taken.add(later)
                cause = replace(cause, side="both")
        yield cause


def _refused(comparison: Comparison) -> Iterator[Cause]:
    for side, ledger in zip(SIDES, comparison.ledgers, strict=True):
        if ledger.refused:
            finding = Finding("absent", ledger.code, f"{ledger.engine} refused the adapter: {ledger.message}")
            yield _under(finding, side=side)


def _of_servers(comparison: Comparison) -> Iterator[Cause]:
    """What the answers of a server showed, which PEFT was compared with."""
    for side, trace in zip(SIDES, comparison.traces, strict=True):
        numbers = {load.load for load, _ in trace.loads}
        for number, outcome in trace.outcomes.items():
            if number in numbers and outcome.code and not outcome.sound:
                evidence = tuple(_of_server(trace))
                yield _named(outcome.code, outcome.message, side=side, factor=outcome.factor, evidence=evidence)


def _of_server(trace: Trace) -> Iterator[str]:
    """Which server was asked, and what it was compared with."""
    if trace.run is not None:
        spec = trace.run.spec
        yield f"`{spec.name}` at {spec.options.get('url', 'an unknown address')}"
        if spec.adapter is not None:
            yield f"compared with {spec.adapter} in PEFT"


def _unsteady(comparison: Comparison) -> Iterator[Cause]:
    of_runs = comparison.outputs.adapter.logprob_error, comparison.outputs.base.logprob_error
    cross = max((error for error in of_runs if error is not None), default=0.0)
    for side, repeats in zip(SIDES, comparison.repeats, strict=True):
        error = max((of_kind.logprob_error for of_kind in repeats.values()), default=0.0)
        if error > logprob_drift(comparison.dtype):
            evidence = tuple(
                f"{kind}: {of_kind.requests} answers to the same requests differ by {of_kind.logprob_error:.2g}"
                for kind, of_kind in repeats.items()
            )
            yield _under(not_deterministic(side, error, cross), side=side, evidence=evidence)


def _prompts(comparison: Comparison) -> Iterator[Cause]:
    if not (different := comparison.prompts):
        return
    first = different[0]
    evidence = []
    for side, trace, ids in zip(SIDES, comparison.traces, (first.reference, first.candidate), strict=True):
        template = ", with its chat template" if trace.run is not None and trace.run.spec.chat else ""
        evidence.append(f"{side}{template}: {_marked(ids, first.first)}")
    evidence.append("the first id that differs is in brackets")
    total = len(comparison.requests) + len(different)
    yield _under(different_prompts(len(different), first.first, total), evidence=tuple(evidence))


def _marked(ids: Sequence[int], at: int, around: int = 12) -> str:
    """Token ids, with the one at `at` in brackets."""
    begin, end = max(at - around, 0), at + around
    words = [f"[{token}]" if number == at else str(token) for number, token in enumerate(ids)]
    if at >= len(ids):
        words.append("[ends]")
    return f"{'... ' if begin else ''}{' '.join(words[begin:end])}{' ...' if end < len(words) else ''}"


def _unasked(comparison: Comparison) -> Iterator[Cause]:
    for side, count in zip(SIDES, comparison.unasked, strict=True):
        if count:
            yield _under(not_requested(side, count), side=side)


def _of_ledger(ledger: Ledger, side: Side, fates: tuple[str, ...]) -> Iterator[tuple[Cause, str]]:
    """What a ledger shows of modules with one of `fates`, and the station that shows it."""
    for clause in clauses(ledger):
        if ledger.refused or not clause.finding.code or not {row.fate for row in clause.rows} <= set(fates):
            continue
        keys = tuple(row.key for row in clause.rows)
        where = "" if clause.names_modules else f"{name_modules(map(path_of, keys), ledger.names)}: "
        cause = _under(clause.finding, modules=keys, side=side)
        yield replace(cause, message=f"{where}{clause.finding.message}"), clause.station


def _lost(comparison: Comparison) -> Iterator[Cause]:
    for side, ledger in zip(SIDES, comparison.ledgers, strict=True):
        for cause, _ in _of_ledger(ledger, side, ("lost",)):
            yield cause


def _files(comparison: Comparison) -> Iterator[Cause]:
    if comparison.files is None:
        return
    facts, known = [difference.text for difference in comparison.adapters], _has_fingerprints(comparison)
    # Rank, scaling and norms are another way to write the same weights, or a part of what differs.
    texts = [difference.text for difference in comparison.file_weights] if known else facts
    texts += [
        f"{name_modules(map(path_of, keys))} only in the {side}'s file"
        for side, keys in zip(SIDES, comparison.unshared, strict=True)
        if keys
    ]
    if comparison.other_tensors:
        texts.append(f"other tensors differ: {_listed(comparison.other_tensors)}")
    if not texts and comparison.differs:
        texts, facts = _rounded_files(comparison), []
    if not texts:
        return
    keys = [key for of_side in comparison.unshared for key in of_side]
    keys += [key for different in comparison.file_weights for key in different.keys]
    keys += [] if known else [key for different in comparison.adapters for key in different.keys]
    factors = {different.factor for different in comparison.file_weights}
    alone = len(factors) == 1 and not comparison.other_tensors
    finding = different_files("; ".join(texts), comparison.files)
    evidence = (*(facts if known else ()), *_behind(comparison))
    yield _under(
        finding, modules=tuple(dict.fromkeys(keys)), factor=factors.pop() if alone else None, evidence=evidence
    )


def _listed(tensors: Sequence[str]) -> str:
    more = f" and {len(tensors) - MOST_NAMED} more" if len(tensors) > MOST_NAMED else ""
    return in_words([f"`{name}`" for name in tensors[:MOST_NAMED]]) + more


def _has_fingerprints(comparison: Comparison) -> bool:
    """Whether the weights of both files are known. They are not in traces of an older version."""
    return all(trace.file_fingerprints for trace in comparison.traces)


def _rounded_files(comparison: Comparison) -> list[str]:
    """Files of two dtypes: what is left are the digits that one of them does not have."""
    dtypes = [dict.fromkeys(m.dtype for m in trace.modules.values() if m.dtype) for trace in comparison.traces]
    names = [in_words(list(of_file)) for of_file in dtypes]
    return [f"the same weights, stored as {names[0]} and as {names[1]}"] if names[0] != names[1] else []


def _weights(comparison: Comparison) -> Iterator[Cause]:
    rules = {
        "factor": weights_at_another_scale,
        "module": weights_of_another_module,
        "adapter": weights_of_another_adapter,
        "other": other_weights_in_use,
    }
    for difference in comparison.weights:
        side, of_ledgers = _side_of(comparison, difference)
        evidence = (*of_ledgers, *_behind(comparison))
        finding = rules[difference.kind](difference.text)
        facts = {"modules": difference.keys, "factor": difference.factor}
        yield _under(finding, **facts, side=side, evidence=evidence)


def _side_of(comparison: Comparison, difference: WeightDifference) -> tuple[Side, tuple[str, ...]]:
    """In which run the weights are not those of the file, and what its ledger says of them."""
    sides: dict[Side, list[str]] = {}
    for side, ledger in zip(SIDES, comparison.ledgers, strict=True):
        for cause, station in _of_ledger(ledger, side, ("wrong",)):
            if station in ("placed", "agrees") and set(cause.modules) & set(difference.keys):
                sides.setdefault(side, []).append(f"{side}: {cause.message} ({cause.code})")
    evidence = tuple(text for texts in sides.values() for text in texts)
    return ("both" if len(sides) == 2 else next(iter(sides), "")), evidence


def _behind(comparison: Comparison) -> Iterator[str]:
    """What follows from weights in the layers behind them."""
    first, own = comparison.first, comparison.largest_own
    if first is not None:
        yield f"first divergence at {comparison.name(first.key)}"
    if own is not None and own.parts is not None:
        yield f"largest error of its own: {comparison.name(own.key)}, {own.parts.own:.2g}"


def _other_slots(comparison: Comparison) -> Iterator[Cause]:
    """Rows that ran with another slot, or with what other weights computed: then all modules seem to be lost."""
    yield from _of_requests(comparison, lambda code: code != "LP602")


def _contaminated(comparison: Comparison) -> Iterator[Cause]:
    """Rows of the base that got a contribution: the adapter's own rows may all be right."""
    yield from _of_requests(comparison, lambda code: code == "LP602")


def _of_requests(comparison: Comparison, wanted: Callable[[str], bool]) -> Iterator[Cause]:
    for side, trace in zip(SIDES, comparison.traces, strict=True):
        for record in trace.request_findings:
            if wanted(record.code):
                yield _named(record.code, record.message, side=side)


def _wrong(comparison: Comparison) -> Iterator[Cause]:
    """What else is wrong in a ledger. Where the weights are the cause, what the kernel computes follows from them."""
    of_weights = {key for difference in comparison.weights for key in difference.keys}
    for side, ledger in zip(SIDES, comparison.ledgers, strict=True):
        placed: set[Key] = set()
        for cause, station in _of_ledger(ledger, side, ("wrong",)):
            about = set(cause.modules)
            if station == "placed":
                placed |= about
            if station in ("placed", "agrees") and about <= of_weights:
                continue
            if station == "agrees" and about <= placed:
                continue
            yield cause


def _bases(comparison: Comparison) -> Iterator[Cause]:
    own_head = any(has_own_head(trace) for trace in comparison.traces)
    why = list(reasons(comparison.modules, comparison.outputs, comparison.dtype, comparison.tolerance, own_head))
    if not why:
        return
    finding = different_bases(why[0])
    tensors = different_tensors(*comparison.traces)
    evidence = why[1:]
    if tensors:
        evidence.append(f"tensors that differ: {_listed(tensors)}")
    evidence += [f"{side}: {_model(trace)}" for side, trace in zip(SIDES, comparison.traces, strict=True)]
    yield _under(finding, evidence=tuple(evidence))


def _model(trace: Trace) -> str:
    dtypes = dict.fromkeys(worker.process.dtype for worker in trace.workers)
    return f"{trace.run.spec.model if trace.run is not None else 'unknown model'} in {in_words(list(dtypes))}"


def _unexplained(comparison: Comparison) -> Iterator[Cause]:
    first = comparison.first
    if first is None:
        error = comparison.outputs.adapter.logprob_error
        what = "the answers differ" if comparison.outputs.first_token is not None else "the runs differ"
        if error is not None and error > logprob_drift(comparison.dtype):
            what = f"log-probabilities of the answers differ by {error:.2g}"
        yield _under(unexplained_difference(f"{what}, and no row of any module by more than rounding"))
        return
    diff = next(diff for diff in comparison.modules if diff.key == first.key)
    x = "" if diff.x_error is None else f"; its ‖x‖ differs by {diff.x_error:.2g}"
    where = f"contributions differ first at {comparison.name(first.key)} (relative error {first.error:.2g}{x})"
    yield _under(unexplained_difference(f"{where}, and neither weights nor requests explain it"), modules=(first.key,))
