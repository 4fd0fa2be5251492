"""One prompt in one batch: a sequence for the base model and one for each adapter, mixed by PEFT's `adapter_names`.

In: the token ids of a prompt, and a `Lane` for each sequence. Out: an answer for each lane. All sequences begin with
the same tokens, so none is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lora_probe.engines.peft.activation import Activation
from lora_probe.engines.peft.models import first_lines
from lora_probe.engines.peft.runner import Runner
from lora_probe.engines.peft.steps import Steps
from lora_probe.errors import EngineFailed
from lora_probe.recording import RequestRecord

BASE = "__base__"
"""PEFT's word for a sequence without an adapter."""


@dataclass(frozen=True)
class Lane:
    """A sequence of every batch. `adapter` is its adapter's name in the trace, `called` that in PEFT; the ids of its
    requests begin with `word`."""

    word: str
    adapter: str | None = None
    called: str = BASE
    steps: Steps | None = None
    activation: Activation | None = None

    def request(self, number: int) -> str:
        return f"{self.word}-{number}"


def run_batch(runner: Runner, model: Any, lanes: Sequence[Lane], number: int, ids: list[int]) -> list[RequestRecord]:
    """Greedy answers to prompt `number` from a live PEFT `model`, token by token in one batch.

    Raises:
        EngineFailed: PEFT does not mix these adapters in a batch (with DoRA, for example), with its message.
        ProbeError: the prompt does not fit the model's context.
    """
    import torch

    answers = [runner.begin(lane.request(number), number, lane.adapter, ids) for lane in lanes]
    cache, feed, position = None, [ids + answer.forced for answer in answers], 0
    with torch.inference_mode():
        while not all(answer.ended for answer in answers):
            end = position + len(feed[0])
            # A sequence that has ended is still in the batch; what it computes is not recorded.
            recorded = {
                lane.request(number): lane for lane, answer in zip(lanes, answers, strict=True) if not answer.ended
            }
            with _mixed(model, lanes, recorded, ids, range(position, end)):
                result = _forward(runner.model, torch.tensor(feed, device=runner.model.device), cache)
            cache, position = result.past_key_values, end
            for answer, logits in zip(answers, result.logits, strict=True):
                answer.extend(logits)
            feed = [[answer.output[-1]] for answer in answers]
    return [answer.record(runner.tokenizer) for answer in answers]


def _mixed(
    model: Any, lanes: Sequence[Lane], recorded: Mapping[str, Lane], ids: list[int], positions: range
) -> ExitStack:
    """Tell PEFT which sequence has which adapter during a forward pass, and record some of the lanes."""
    firsts = {lane: 0 if lane.activation is None else lane.activation.first(ids) for lane in lanes}
    offsets = None
    if any(lane.activation is not None for lane in lanes):
        offsets = [None if first is None else positions.stop - first for first in firsts.values()]
    names = [lane.called for lane in lanes]
    with ExitStack() as stack:
        stack.enter_context(model.base_model._enable_peft_forward_hooks(adapter_names=names, alora_offsets=offsets))
        for request, lane in recorded.items():
            if lane.steps is not None:
                stack.enter_context(lane.steps.stepping(request, positions, len(ids), firsts[lane]))
        return stack.pop_all()


def _forward(model: Any, tokens: Any, cache: Any) -> Any:
    try:
        return model(input_ids=tokens, past_key_values=cache, use_cache=True)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise EngineFailed(
            f"PEFT does not run these adapters in one batch: {first_lines(error)}", "trace each of them alone"
        ) from error
