"""Which steps are observed if only some are wanted (`LORA_PROBE_SAMPLE`). A compiled engine runs these eager.

In: the scheduler's output of each step, in order. Out: whether this step is chosen. The choice depends on nothing else,
so that all workers of an engine agree: ranks that ran compiled and eager code in one step could wait for each other for
ever. Chosen are the first prefill chunk and the first decode steps of every adapter, then one step in `every`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lora_probe.errors import ProbeError

SAMPLE = "LORA_PROBE_SAMPLE"
MAX_TOKENS = 512
"""A step with more tokens is never run eager: vLLM measured how much memory its compiled model needs, and an eager one
may need more."""
FIRST_PREFILLS, FIRST_DECODES = 1, 4


@dataclass
class _Seen:
    """The chosen steps with rows of one adapter."""

    prefills: int = 0
    decodes: int = 0


class ChosenSteps:
    """Chooses steps from the first one on. A request is forgotten when the scheduler reports it as finished."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.too_long = 0
        """How many steps would have been chosen, but had more than MAX_TOKENS."""
        self._adapters: dict[str, tuple[int, str] | None] = {}
        self._prompts: dict[str, int] = {}
        self._seen: dict[tuple[int, str], _Seen] = {}
        self._incomplete: set[tuple[int, str]] = set()
        self._since = 0

    def choose(self, scheduler_output: Any) -> bool:
        """Whether the step of this `SchedulerOutput` is run eager."""
        self._note(scheduler_output)
        wanted = self._wanted(scheduler_output) if self._incomplete else []
        self._since += 1
        # A step without any adapter teaches nothing; the next one with an adapter is chosen in its place.
        requests = scheduler_output.num_scheduled_tokens
        due = self._since >= self.every and any(self._adapters.get(request) for request in requests)
        if not wanted and not due:
            return False
        if scheduler_output.total_num_scheduled_tokens > MAX_TOKENS:
            self.too_long += 1
            return False
        for adapter, prefill in wanted:
            seen = self._seen[adapter]
            seen.prefills += prefill
            seen.decodes += not prefill
            if seen.prefills >= FIRST_PREFILLS and seen.decodes >= FIRST_DECODES:
                self._incomplete.discard(adapter)
        self._since = 0
        return True

    def _note(self, scheduler_output: Any) -> None:
        """The requests that have ended, and those that begin."""
        for request in scheduler_output.finished_req_ids:
            self._adapters.pop(request, None)
            self._prompts.pop(request, None)
        for new in scheduler_output.scheduled_new_reqs:
            lora = new.lora_request
            # The V2 runner is sent a preempted request as a new one, with its answer as part of what is prefilled.
            adapter = (lora.lora_int_id, lora.lora_path) if lora is not None else None
            self._adapters[new.req_id] = adapter
            self._prompts.setdefault(new.req_id, len(new.prompt_token_ids or ()))
            # An adapter that is read again for this request is another load, with first steps of its own.
            if adapter is not None and (adapter not in self._seen or getattr(lora, "load_inplace", False)):
                self._seen[adapter] = _Seen()
                self._incomplete.add(adapter)

    def _wanted(self, scheduler_output: Any) -> list[tuple[tuple[int, str], bool]]:
        """The adapters of which too few steps were chosen; and whether this one is a prefill of theirs."""
        cached = scheduler_output.scheduled_cached_reqs
        starts = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        kinds: dict[tuple[tuple[int, str], bool], None] = {}
        for request, start in starts.items():
            adapter = self._adapters.get(request)
            if adapter is not None and adapter in self._incomplete:
                kinds[adapter, start < self._prompts[request]] = None
        enough = {True: FIRST_PREFILLS, False: FIRST_DECODES}
        taken = {kind: self._seen[kind[0]].prefills if kind[1] else self._seen[kind[0]].decodes for kind in kinds}
        return [kind for kind in kinds if taken[kind] < enough[kind[1]]]


def sample_every() -> int | None:
    """The value of LORA_PROBE_SAMPLE; None if it is not set.

    Raises:
        ProbeError: it is not a positive whole number.
    """
    text = os.environ.get(SAMPLE)
    if not text:
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ProbeError(f"{SAMPLE} is `{text}`, expected a whole number of at least 1", f"for example: {SAMPLE}=200")
    return int(text)
