"""Activated LoRA (aLoRA): from which position on PEFT applies the adapter.

In: a live PEFT model whose adapter has invocation tokens, the tokens of a prompt. Out: the first position of the last
invocation in it, and PEFT's layers told so for a forward pass. Without an invocation PEFT runs the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from lora_probe.adapter.variants import ALORA
from lora_probe.engines.peft.slots import ADAPTER


@dataclass(frozen=True)
class Activation:
    """The invocation `tokens` of the adapter of `model`."""

    model: Any
    tokens: tuple[int, ...]

    def first(self, prompt: Sequence[int]) -> int | None:
        """The position of the last invocation in a prompt; None without one."""
        length = len(self.tokens)
        for at in range(len(prompt) - length, -1, -1):
            if tuple(prompt[at : at + length]) == self.tokens:
                return at
        return None

    def running(self, first: int | None, end: int) -> AbstractContextManager[None]:
        """A forward pass up to position `end`, with the adapter from `first` on. PEFT counts from the end."""
        offset = None if first is None else end - first
        context: AbstractContextManager[None] = self.model.base_model._enable_peft_forward_hooks(alora_offsets=[offset])
        return context


def activation_of(model: Any, adapter: str = ADAPTER) -> Activation | None:
    """The activation of an adapter of a live PEFT model; None if it is active at every position."""
    tokens = getattr(model.peft_config[adapter], ALORA.field, None)
    return Activation(model, tuple(tokens)) if tokens else None
