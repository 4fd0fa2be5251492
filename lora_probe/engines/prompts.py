"""Prompts as token ids, the same for every engine.

In: the spec's prompts and the base model's tokenizer (a transformers tokenizer). Out: their ids, and the forced answer
ids of a run that follows another trace.
"""

from __future__ import annotations

from typing import Any

from lora_probe.errors import ProbeError
from lora_probe.recording import RunSpec

BUILT_IN = (
    "Who are you?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
"""The prompts of `trace` if none is passed."""


def encode(spec: RunSpec, tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt, with the tokenizer's special tokens, or through its chat template.

    Raises:
        ProbeError: a prompt without tokens, or a chat prompt for a tokenizer without a template.
    """
    encoded = []
    for number, prompt in enumerate(spec.prompts):
        ids = list(prompt.ids) or _encode(prompt.text, spec.chat, tokenizer)
        if not ids:
            raise ProbeError(f"prompt {number + 1} ({prompt.text!r}) has no tokens", "pass a prompt with text in it")
        encoded.append(ids)
    return encoded


def forced(spec: RunSpec, number: int) -> list[int]:
    """The ids that are forced after prompt `number`; the answer begins with them."""
    return spec.continuation[number] if spec.continuation else []


def texts(forced_ids: list[int], generated: list[int], tokenizer: Any) -> dict[str, str]:
    """The texts of a `RequestRecord` whose answer begins with forced tokens. A special token that was generated is part
    of `generated_text`: often an answer's only new token is the one that ends it."""
    return {
        "text": tokenizer.decode(forced_ids + generated, skip_special_tokens=True),
        "forced_text": tokenizer.decode(forced_ids, skip_special_tokens=True),
        "generated_text": tokenizer.decode(generated),
    }


def _encode(text: str, chat: bool, tokenizer: Any) -> list[int]:
    if not chat:
        return list(tokenizer(text).input_ids)
    if not getattr(tokenizer, "chat_template", None):
        raise ProbeError("the base model's tokenizer has no chat template", "remove --chat")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)
