"""An answer that grows token by token, greedily.

In: the logits of each forward pass. Out: the tokens, their log-probabilities, and the `RequestRecord` of the answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from lora_probe.engines.prompts import texts
from lora_probe.recording import RequestRecord


@dataclass
class Generation:
    """The answer to prompt `number`, whose tokens are `ids`. It begins with `forced` tokens, and ends with one of `eos`
    or at a length of `longest`."""

    request: str
    number: int
    adapter: str | None
    ids: list[int]
    forced: list[int]
    longest: int
    eos: set[int]
    logprobs: list[float | None] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.output = list(self.forced)
        self.ended = False

    def extend(self, logits: Any) -> None:
        """Append the next token. `logits: [rows, vocabulary]`, the last row is that of the last token so far."""
        if self.ended:
            return
        # One row more than the forced tokens that follow: the last row predicts the next token.
        scores = logits[len(self.logprobs) - len(self.output) - 1 :].float().log_softmax(-1)
        token = int(scores[-1].argmax())
        self.output.append(token)
        tokens = zip(scores, self.output[len(self.logprobs) :], strict=True)
        self.logprobs += [round(float(row[at]), 6) for row, at in tokens]
        self.ended = token in self.eos or len(self.output) >= self.longest

    def record(self, tokenizer: Any) -> RequestRecord:
        """The answer, with its texts."""
        if self.forced:
            parts = texts(self.forced, self.output[len(self.forced) :], tokenizer)
        else:
            parts = {"text": tokenizer.decode(self.output, skip_special_tokens=True)}
        seconds = round(time.perf_counter() - self.began, 3)
        return RequestRecord(
            self.request,
            self.number,
            self.adapter,
            self.ids,
            self.output,
            logprobs=self.logprobs,
            seconds=seconds,
            **parts,
        )
