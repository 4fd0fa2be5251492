"""Prompts that both runs have as text, and whose token ids differ.

In: two traces. Out: a `PromptDifference` for each prompt of the same text that became other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_probe.comparison.joined import common
from lora_probe.recording import Trace


@dataclass(frozen=True)
class PromptDifference:
    """One text, and its token ids in both runs. `first` is the index of the first id that differs."""

    text: str
    reference: tuple[int, ...]
    candidate: tuple[int, ...]

    @property
    def first(self) -> int:
        return common(list(self.reference), list(self.candidate))


def prompt_differences(reference: Trace, candidate: Trace) -> tuple[PromptDifference, ...]:
    """The prompts whose ids differ, in the order of the reference."""
    texts = _ids_by_text(candidate)
    return tuple(
        PromptDifference(text, ids, texts[text])
        for text, ids in _ids_by_text(reference).items()
        if text in texts and texts[text] != ids
    )


def _ids_by_text(trace: Trace) -> Mapping[str, tuple[int, ...]]:
    prompts = trace.run.spec.prompts if trace.run is not None else []
    ids = {request.prompt: tuple(request.prompt_ids) for request in trace.answers}
    by_text: dict[str, tuple[int, ...]] = {}
    for number, prompt in enumerate(prompts):
        of_request = ids.get(number, tuple(prompt.ids))
        if prompt.text and of_request:
            by_text.setdefault(prompt.text, of_request)
    return by_text
