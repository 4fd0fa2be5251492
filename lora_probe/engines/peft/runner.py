"""Runs prompts through a live PEFT or base model, one after the other. In vLLM its own engine does this.

In: token ids, and the `Steps` that record the forward passes, if any. Out: answers, and the distributions of scored
passes.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

from lora_probe.engines.peft.activation import Activation
from lora_probe.engines.peft.generation import Generation
from lora_probe.engines.peft.models import encodes, generates, next_logprobs
from lora_probe.engines.peft.pooled import answer_of
from lora_probe.engines.peft.steps import Stepping
from lora_probe.engines.prompts import forced
from lora_probe.errors import ProbeError
from lora_probe.recording import RequestRecord, RunSpec, Score, TraceWriter
from lora_probe.recording.records import ScoreKind


def end_ids(generation: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer, from the generation config (as in vLLM) and the tokenizer."""
    eos = getattr(generation, "eos_token_id", None)
    ids = eos if isinstance(eos, list) else [eos]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


@dataclass(frozen=True)
class Runner:
    """Runs one prompt after the other through the model."""

    model: Any
    tokenizer: Any
    spec: RunSpec
    eos: set[int]
    writer: TraceWriter
    activation: Activation | None = None
    """Where the adapter is active; None: everywhere."""

    def run(
        self, request: str, prompt: int, ids: list[int], adapter: str | None, steps: Stepping | None = None
    ) -> RequestRecord:
        """Greedy generation: the prompt in one forward pass, then a token at a time. Models that do not generate answer
        in one pass."""
        import torch

        if not generates(self.model):
            self._require_room(prompt, ids, len(ids) - 1)
            return self._once(request, prompt, ids, adapter, steps)

        generation = self.begin(request, prompt, adapter, ids)
        # A decoder behind an encoder does not have the prompt in its own input, which begins with a token of its own.
        start = self._start() if encodes(self.model) else None
        cache, feed, encoded = None, (ids if start is None else [start]) + generation.forced, {}
        with torch.inference_mode():
            if start is not None:
                encoded = {"encoder_outputs": self._encode(steps, request, ids)}
            while not generation.ended:
                position = len(ids) + len(generation.output) - len(feed) + (start is not None)
                result = self._forward(steps, request, feed, position, ids, cache, **encoded)
                cache = result.past_key_values
                generation.extend(result.logits[0])
                feed = [generation.output[-1]]
        return generation.record(self.tokenizer)

    def begin(self, request: str, prompt: int, adapter: str | None, ids: list[int]) -> Generation:
        """An answer with its forced tokens.

        Raises:
            ProbeError: the prompt does not fit the model's context.
        """
        beginning = list(forced(self.spec, prompt))
        longest = len(beginning) + self.spec.max_tokens
        if context := self._require_room(prompt, ids, len(ids) + len(beginning)):
            # As in vLLM, an answer ends where the context ends.
            longest = min(longest, context - len(ids))
        return Generation(request, prompt, adapter, ids, beginning, longest, self.eos)

    def _require_room(self, prompt: int, ids: list[int], taken: int) -> int | None:
        """The model's context, None if its config does not limit it.

        Raises:
            ProbeError: there is no room for a token after the first `taken` ones.
        """
        context: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if context and taken >= context:
            raise ProbeError(f"prompt {prompt + 1} has {len(ids)} tokens, but the model's context is {context}")
        return context

    def _start(self) -> int:
        """The token that a decoder's input begins with."""
        for config in (self.model.generation_config, self.model.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if (token := getattr(config, name, None)) is not None:
                    return int(token)
        raise ProbeError(f"the config of `{self.spec.model}` does not say with which token its decoder starts")

    def _encode(self, steps: Stepping | None, request: str, ids: list[int]) -> Any:
        import torch

        with self._recorded(steps, request, range(len(ids)), len(ids)):
            return self.model.get_encoder()(torch.tensor([ids], device=self.model.device))

    def _once(
        self, request: str, prompt: int, ids: list[int], adapter: str | None, steps: Stepping | None
    ) -> RequestRecord:
        """The answer of a classifier, a tagger or an encoder to a prompt."""
        import torch

        started = time.perf_counter()
        feed = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode(), self._recorded(steps, request, range(len(ids)), len(ids)):
            result = self.model(input_ids=feed)
        labels, logprobs, text = answer_of(result, self.model.config)
        seconds = round(time.perf_counter() - started, 3)
        return RequestRecord(request, prompt, adapter, ids, labels, text, logprobs, seconds)

    @staticmethod
    def _recorded(
        steps: Stepping | None, request: str, positions: range, prompt: int, first: int | None = 0
    ) -> AbstractContextManager[None]:
        return steps.stepping(request, positions, prompt, first) if steps is not None else nullcontext()

    def score(
        self, request: str, kind: ScoreKind, answer: RequestRecord, steps: Stepping | None = None, unmeasured: str = ""
    ) -> None:
        """The prompt and all but the last token of its answer in one pass: a distribution for every answer token."""
        import torch

        count = len(answer.output_ids)
        logprobs = None
        if not unmeasured:
            with torch.inference_mode():
                feed = answer.prompt_ids + answer.output_ids[:-1]
                result = self._forward(steps, request, feed, 0, answer.prompt_ids, None)
                logprobs = next_logprobs(result.logits, count)
        score = Score(request, answer.prompt, kind, answer.prompt_ids, answer.output_ids, unmeasured)
        self.writer.score(score, logprobs)

    def _forward(
        self,
        steps: Stepping | None,
        request: str,
        feed: list[int],
        position: int,
        prompt: list[int],
        cache: Any,
        **encoded: Any,
    ) -> Any:
        import torch

        tensor = torch.tensor([feed], device=self.model.device)
        name = "decoder_input_ids" if encoded else "input_ids"
        positions = range(position, position + len(feed))
        with ExitStack() as stack:
            first: int | None = 0
            if self.activation is not None and steps is not None:
                first = self.activation.first(prompt)
                stack.enter_context(self.activation.running(first, positions.stop))
            stack.enter_context(self._recorded(steps, request, positions, len(prompt), first))
            return self.model(**{name: tensor}, past_key_values=cache, use_cache=True, **encoded)
