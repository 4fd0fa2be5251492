"""What a difference does to the answers: tokens, log-probabilities, and next-token distributions if they were scored.

In: the requests that two runs have in common, for the adapter and for its base. Out: `Outputs`; and, for requests that
a run has several times, how far its answers to the same tokens are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lora_probe.comparison.effect import divergence
from lora_probe.comparison.joined import RequestDiff, common
from lora_probe.errors import ProbeError
from lora_probe.precision import floor, logprob_drift
from lora_probe.recording import Floats, RequestRecord, Score, Scored, Trace


@dataclass(frozen=True)
class FirstToken:
    """The first token that both runs choose differently: the prompt, its index in the answer, and both ids (None if an
    answer ends before it)."""

    prompt: int
    token: int
    reference: int | None
    candidate: int | None


@dataclass(frozen=True)
class Agreement:
    """Answers of both runs, up to the first token that differs: `same` of `tokens` tokens that were not forced are the
    same. `logprob_error` is the largest difference of the log-probabilities of the common tokens.

    With scored passes, over the same tokens in both: `kl` is the mean of KL(p‖q) in nats, reference p and candidate q,
    and `top1` the share of tokens whose most likely successor is the same.
    """

    tokens: int = 0
    same: int = 0
    logprob_error: float | None = None
    kl: float | None = None
    top1: float | None = None

    def differs(self, dtype: str) -> bool:
        """Whether log-probabilities or distributions are further apart than two engines of that dtype may be."""
        limit = logprob_drift(dtype)
        beyond = self.logprob_error is not None and self.logprob_error > limit
        return beyond or (self.kl is not None and self.kl > limit**2)


@dataclass(frozen=True)
class Outputs:
    """The answers of the adapter and of its base in both runs. `survives` is the share of the adapter's effect on the
    next tokens that is left in the candidate, as in `parity`: 1 - sqrt(KL(p‖q) / KL(p‖base)); None if it was not
    scored, or if there is no effect."""

    adapter: Agreement
    base: Agreement
    first_token: FirstToken | None
    survives: float | None


@dataclass(frozen=True)
class Repeats:
    """The same request, several times in one run: the largest difference between the log-probabilities of the tokens
    that its answers have in common, and whether all answers have the same tokens."""

    requests: int
    logprob_error: float
    same_tokens: bool


def outputs(
    reference: Trace,
    candidate: Trace,
    requests: Sequence[RequestDiff],
    of_base: Sequence[RequestDiff],
    dtype: str,
) -> Outputs:
    """Both runs' answers beside each other.

    Raises:
        ProbeError: the vocabularies of the scored passes differ.
        UnreadableFile: a scored pass is damaged.
    """
    scored = _scored(_same_prompts(_passes(reference, "adapter"), _passes(candidate, "adapter")))
    of_base_scored = _scored(_same_prompts(_passes(reference, "base"), _passes(candidate, "base")))
    effect = _scored(_same_prompts(_passes(reference, "adapter"), _passes(reference, "base"))).kl
    first = next((_first_token(request) for request in requests if request.diverged), None)
    adapter, base = _agreement(reference, candidate, requests), _agreement(reference, candidate, of_base)
    kept = effect is not None and np.isfinite(effect) and effect >= floor(dtype)
    return Outputs(
        replace(adapter, kl=scored.kl, top1=scored.top1),
        replace(base, kl=of_base_scored.kl, top1=of_base_scored.top1),
        # Answers that were forced are the same, and their distributions may not be.
        first or scored.first,
        1 - float(np.sqrt(scored.kl / effect)) if kept and scored.kl is not None and effect is not None else None,
    )


def repeats(trace: Trace) -> dict[str, Repeats]:
    """What a run answered to requests that it has several times: of the `adapter`, and of the `base`."""
    groups: dict[tuple[str | None, tuple[int, ...]], list[RequestRecord]] = {}
    for request in trace.answers:
        groups.setdefault((request.adapter, tuple(request.prompt_ids)), []).append(request)
    results: dict[str, Repeats] = {}
    for kind in ("adapter", "base"):
        again = [group for (name, _), group in groups.items() if (name is None) == (kind == "base") and len(group) > 1]
        if again:
            pairs = [(group[0], other) for group in again for other in group[1:]]
            errors = [error for one, two in pairs if (error := _logprob_error(one, two)) is not None]
            same = all(one.output_ids == two.output_ids for one, two in pairs)
            results[kind] = Repeats(sum(map(len, again)), max(errors, default=0.0), same)
        elif (scored := _repeated_scores(trace, kind)) is not None:
            results[kind] = scored
    return results


def _repeated_scores(trace: Trace, kind: str) -> Repeats | None:
    """The same of scored passes, which a base has in place of answers; None if none was repeated."""
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Scored]] = {}
    for scored in trace.scores:
        if scored.score.kind == kind and not scored.score.unmeasured:
            groups.setdefault((tuple(scored.score.prompt_ids), tuple(scored.score.answer_ids)), []).append(scored)
    again = [group for group in groups.values() if len(group) > 1]
    errors = []
    for first, *others in again:
        p, chosen = first.logprobs(), (np.arange(len(first.score.answer_ids)), first.score.answer_ids)
        for other in others:
            q = other.logprobs()
            if p is not None and q is not None and p.shape == q.shape and p.size:
                errors.append(float(np.abs(p[chosen].astype(np.float64) - q[chosen]).max()))
    return Repeats(sum(map(len, again)), max(errors, default=0.0), True) if again else None


def _agreement(reference: Trace, candidate: Trace, requests: Iterable[RequestDiff]) -> Agreement:
    tokens = same = 0
    errors = []
    for request in requests:
        forced = max(reference.forced(request.reference), candidate.forced(request.candidate))
        # After the first token that differs, the runs see other tokens.
        compared = min(request.same_tokens + request.diverged, len(request.reference.output_ids))
        tokens += max(compared - forced, 0)
        same += max(request.same_tokens - forced, 0)
        if request.logprob_error is not None:
            errors.append(request.logprob_error)
    return Agreement(tokens, same, max(errors, default=None))


def _first_token(request: RequestDiff) -> FirstToken:
    at = request.same_tokens
    answers = request.reference.output_ids, request.candidate.output_ids
    one, two = (answer[at] if at < len(answer) else None for answer in answers)
    return FirstToken(request.prompt, at, one, two)


def _logprob_error(one: RequestRecord, two: RequestRecord) -> float | None:
    # At the first token that differs both runs chose their most likely one, so these are compared too.
    same = common(one.output_ids, two.output_ids) + 1
    both = zip(one.logprobs[:same], two.logprobs[:same], strict=False)
    return max((abs(a - b) for a, b in both if a is not None and b is not None), default=None)


def _passes(trace: Trace, kind: str) -> list[Scored]:
    return [scored for scored in trace.scores if scored.score.kind == kind]


def _same_prompts(some: Iterable[Scored], others: Iterable[Scored]) -> Iterator[tuple[Scored, Scored]]:
    """The scored passes over the same prompt."""
    by_prompt = {tuple(scored.score.prompt_ids): scored for scored in others}
    for scored in some:
        if (other := by_prompt.get(tuple(scored.score.prompt_ids))) is not None:
            yield scored, other


@dataclass(frozen=True)
class _Scores:
    """The mean KL of pairs of passes in nats, how often the most likely token is the same, and the first that is
    not."""

    kl: float | None = None
    top1: float | None = None
    first: FirstToken | None = None


def _scored(pairs: Iterable[tuple[Scored, Scored]]) -> _Scores:
    divergences, same, first = [], [], None
    for one, two in pairs:
        p, q = one.logprobs(), two.logprobs()
        rows = _common_rows(one.score, two.score)
        if p is None or q is None or not rows:
            continue
        _refuse_other_vocabulary(one, two, p, q)
        divergences.append(divergence(p[:rows], q[:rows]))
        best = p[:rows].argmax(-1), q[:rows].argmax(-1)
        same.append(best[0] == best[1])
        if first is None and not same[-1].all():
            at = int(same[-1].argmin())
            first = FirstToken(one.score.prompt, at, int(best[0][at]), int(best[1][at]))
    if not divergences:
        return _Scores()
    return _Scores(float(np.concatenate(divergences).mean()), float(np.concatenate(same).mean()), first)


def _common_rows(one: Score, two: Score) -> int:
    """Row n is the distribution after the first n tokens of an answer."""
    return min(common(one.answer_ids, two.answer_ids) + 1, len(one.answer_ids), len(two.answer_ids))


def _refuse_other_vocabulary(one: Scored, two: Scored, p: Floats, q: Floats) -> None:
    if p.shape[1] != q.shape[1]:
        raise ProbeError(
            f"the vocabularies differ: {p.shape[1]} tokens in `{one.path}`, {q.shape[1]} in `{two.path}`",
            "do both runs have the same base model?",
        )
