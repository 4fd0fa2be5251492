"""What two traces have in common: requests with the same prompt, and their rows.

In: a reference and a candidate trace. Out: their requests with the same prompt, their rows joined on prompt and
position as long as both runs saw the same tokens, and the distances between the contributions of joined rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lora_probe.adapter.spectrum import delta_norms
from lora_probe.recording import Floats, RequestRecord, Rows, Trace
from lora_probe.recording.placed import Held, grams_of
from lora_probe.recording.rows import places

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RequestDiff:
    """One prompt in both runs, and how many tokens of the answer are the same. `cut`: the shorter answer has as many
    tokens as its run allowed."""

    reference: RequestRecord
    candidate: RequestRecord
    same_tokens: int
    logprob_error: float | None
    cut: bool = False

    @property
    def prompt(self) -> int:
        return self.reference.prompt

    @property
    def equal(self) -> bool:
        return self.reference.output_ids == self.candidate.output_ids

    @property
    def diverged(self) -> bool:
        """Whether the answers part: one that only ends earlier, because it was cut, is no other answer."""
        shorter = min(len(self.reference.output_ids), len(self.candidate.output_ids))
        return not self.equal and not (self.cut and self.same_tokens == shorter)

    @property
    def span(self) -> int:
        """The number of positions up to which both runs saw the same tokens."""
        return len(self.reference.prompt_ids) + self.same_tokens


def matched_requests(reference: Trace, candidate: Trace, of_base: bool = False) -> tuple[RequestDiff, ...]:
    """The requests for an adapter (or those `of_base`) that have the same prompt tokens in both runs, paired in order
    if a run has several. If both runs have an adapter of the same name, only its own requests are paired; and if one
    has several loads of it, those that ran with the same file before others."""
    names = [{request.adapter for request in trace.answers} for trace in (reference, candidate)]
    shared = names[0] & names[1]

    def question(request: RequestRecord) -> tuple[tuple[int, ...], str | None]:
        return tuple(request.prompt_ids), request.adapter if request.adapter in shared else None

    files = [_files_of_requests(trace) for trace in (reference, candidate)]
    answers: dict[object, list[RequestRecord]] = {}
    for request in candidate.answers:
        if (request.adapter is None) == of_base:
            answers.setdefault(question(request), []).append(request)
    diffs = []
    for request in reference.answers:
        candidates = answers.get(question(request), [])
        if (request.adapter is None) != of_base or not candidates:
            continue
        own = files[0].get(request.id)
        other = next((candidate for candidate in candidates if files[1].get(candidate.id) == own), candidates[0])
        if len(candidates) > 1:
            candidates.remove(other)
        same = common(request.output_ids, other.output_ids)
        both = zip(request.logprobs[:same], other.logprobs[:same], strict=False)
        errors = [abs(a - b) for a, b in both if a is not None and b is not None]
        shorter = (reference, request) if len(request.output_ids) <= len(other.output_ids) else (candidate, other)
        diffs.append(RequestDiff(request, other, same, max(errors, default=None), _is_cut(*shorter)))
    return tuple(diffs)


def _files_of_requests(trace: Trace) -> dict[str, str]:
    """The digest of the file with which each request ran, if the trace has several loads."""
    if len(trace.loads) < 2 or trace.rows is None:
        # With one load, all of them ran with it.
        digests = {load.digest for load, _ in trace.loads}
        return dict.fromkeys((request.id for request in trace.answers), digests.pop()) if len(digests) == 1 else {}
    rows, of_load = trace.rows, {load.load: load.digest for load, _ in trace.loads}
    pairs = sorted(set(zip(rows.request.tolist(), rows.load.tolist(), strict=True)))
    return {rows.requests[number]: of_load[load] for number, load in pairs if load in of_load}


def _is_cut(trace: Trace, request: RequestRecord) -> bool:
    """Whether an answer has as many tokens as `--max-tokens` allowed. Where no client recorded answers, the last token
    of each is not known."""
    if trace.run is None:
        return not trace.requests
    return len(request.output_ids) - trace.forced(request) >= trace.run.spec.max_tokens


def common(one: list[int], two: list[int]) -> int:
    """The length of the common beginning."""
    count = 0
    for a, b in zip(one, two, strict=False):
        if a != b:
            break
        count += 1
    return count


@dataclass(frozen=True)
class Joined:
    """Row numbers of both traces that belong together. `where`: (prompt, position, number of the token)."""

    reference: Rows
    candidate: Rows
    reference_rows: npt.NDArray[np.intp]
    candidate_rows: npt.NDArray[np.intp]
    where: list[tuple[int, int, int]]

    @cached_property
    def loads(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The loads that each row ran with in both runs, negative without one."""
        return self.reference.load[self.reference_rows], self.candidate.load[self.candidate_rows]

    @cached_property
    def pairs_of_loads(self) -> list[tuple[int, int]]:
        """Each pair of loads that a row ran with."""
        return sorted(set(zip(*(column.tolist() for column in self.loads), strict=True)))

    @property
    def routed_differently(self) -> Bools:
        """The rows that ran with the adapter in one run only."""
        one, two = self.loads
        different: Bools = (one >= 0) != (two >= 0)
        return different


def join(reference: Trace, candidate: Trace, requests: Sequence[RequestDiff]) -> Joined | None:
    """The rows of `requests` that are in both runs, as long as they saw the same tokens; None if there are none."""
    one, two = reference.rows, candidate.rows
    if one is None or two is None:
        return None
    here, there = places(one), places(two)
    reference_rows, candidate_rows, where = [], [], []
    for request in requests:
        begin = len(request.reference.prompt_ids)
        for position in range(request.span):
            a = here.get((request.reference.id, position))
            b = there.get((request.candidate.id, position))
            if a is not None and b is not None:
                reference_rows.append(a)
                candidate_rows.append(b)
                where.append((request.prompt, position, position - begin))
    if not where:
        return None
    return Joined(one, two, np.array(reference_rows, np.intp), np.array(candidate_rows, np.intp), where)


def by_load(joined: Joined) -> Iterator[tuple[tuple[int, int], Bools]]:
    """The joined rows by the loads that they ran with in both runs: the two loads, and which rows."""
    loads = joined.loads
    for one, two in joined.pairs_of_loads:
        yield (one, two), (loads[0] == one) & (loads[1] == two)


def distances(joined: Joined, here: int, there: int, comparable: bool = True) -> tuple[Floats, bool]:
    """‖delta_candidate − delta_reference‖ of each joined row, and whether all of them are exact.

    From the deltas themselves, or from the shrinks and the G of each row's own load. If a row has neither (it ran
    without a load, or its level does not keep them), or if A is another one, so that shrinks are not `comparable`, the
    difference of the norms is a lower bound.
    """
    one, two = joined.reference, joined.candidate
    key = one.modules[here]
    if one.delta and two.delta and key in one.delta and key in two.delta:
        deltas = one.delta[key][joined.reference_rows], two.delta[key][joined.candidate_rows]
        if deltas[0].shape == deltas[1].shape:
            return np.linalg.norm(deltas[1] - deltas[0], axis=-1), True
    distance: Floats = np.abs(
        two.delta_norm[joined.candidate_rows, there] - one.delta_norm[joined.reference_rows, here]
    )
    if one.shrink is None or two.shrink is None or not comparable:
        return distance, False
    rank = min(one.shrink.shape[-1], two.shrink.shape[-1])
    shrinks_one = one.shrink[joined.reference_rows, here, :rank]
    shrinks_two = two.shrink[joined.candidate_rows, there, :rank]
    # The level of a server may be changed while it records: these rows have a norm and no shrink.
    unkept = np.isnan(shrinks_one).all(-1) & np.isfinite(one.delta_norm[joined.reference_rows, here])
    unkept |= np.isnan(shrinks_two).all(-1) & np.isfinite(two.delta_norm[joined.candidate_rows, there])
    exact = not unkept.any()
    for (load_one, load_two), of_loads in by_load(joined):
        chosen = of_loads & ~unkept
        held_one, held_two = grams_of(one.placed, load_one, here), grams_of(two.placed, load_two, there)
        if held_one is None or held_two is None:
            exact = False
            continue
        distance[chosen], same = _from_shrinks(shrinks_one[chosen], shrinks_two[chosen], held_one, held_two)
        exact = exact and same
    # Two vectors are at most as far apart as both are long: exactly that, if one of them is zero.
    longest = one.delta_norm[joined.reference_rows, here] + two.delta_norm[joined.candidate_rows, there]
    return (distance if exact else np.fmin(distance, longest)), exact


def _from_shrinks(shrinks_one: Floats, shrinks_two: Floats, held_one: Held, held_two: Held) -> tuple[Floats, bool]:
    """If both runs placed the same B: `d·G·dᵀ`, where d is the difference of the shrinks. Otherwise: the part that the
    shrinks explain, plus the difference of the norms of the candidate's shrink with either B (a lower bound)."""
    rank = shrinks_one.shape[-1]
    grams = [held.gram[:rank, :rank] for held in (held_one, held_two)]
    from_shrink = delta_norms(shrinks_two - shrinks_one, grams[0])
    if held_one.digest == held_two.digest != "":
        return from_shrink, True
    norm_by = [delta_norms(shrinks_two, gram) for gram in grams]
    bound: Floats = from_shrink + np.abs(norm_by[1] - norm_by[0])
    return bound, False
