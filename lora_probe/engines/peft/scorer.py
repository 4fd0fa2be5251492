"""Log-probabilities of given tokens in PEFT, at any scaling of the adapter.

In: an adapter's folder and its base model. Out: `[tokens - 1]` natural logarithms for each text, one for every token
but the first. What another engine answers is held against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.engines.peft.loads import attach
from lora_probe.engines.peft.models import load_model, load_tokenizer, shapes_of
from lora_probe.engines.peft.slots import ADAPTER
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.recording import NamedAdapter, RunSpec, TraceWriter

Doubles = npt.NDArray[np.float64]


class Scorer:
    """A base model with an adapter in PEFT. Between two calls the adapter has its own scaling.

    Raises:
        EngineFailed: the base model cannot be loaded, or PEFT refuses the adapter.
    """

    def __init__(self, spec: RunSpec, writer: TraceWriter) -> None:
        model = load_model(spec.model, spec.options.get("dtype", "auto"))
        self.tokenizer: Any = load_tokenizer(spec.model)
        self.shapes = shapes_of(model)
        assert spec.adapter is not None
        attached = attach(model, NamedAdapter(spec.name, spec.adapter), spec, writer)
        if attached.refused is not None:
            raise EngineFailed(f"PEFT refuses the adapter `{spec.adapter}`: {attached.refused}")
        self._model, self._slots = attached.model, attached.slots
        config = self._model.peft_config[ADAPTER]
        plain = config.bias == "none" and not config.modules_to_save
        self.scalable = plain and all(slot.variant is None for slot in self._slots.values())
        """Whether the scaling is all that decides how much the adapter changes: it has no whole modules and no biases,
        and is no variant of LoRA."""

    def logprobs(self, texts: Sequence[Sequence[int]], scaling: float) -> list[Doubles]:
        """The log-probabilities of every token but the first of each text. `scaling` is relative to the trained one; 0
        is the base model.

        Raises:
            ProbeError: a text has a token that the base model does not have, or is longer than its context.
        """
        import torch

        trained = {name: slot.scaling for name, slot in self._slots.items()}
        try:
            for name, slot in self._slots.items():
                slot.layer.scaling[slot.adapter] = trained[name] * scaling
            without = self._model.disable_adapter() if scaling == 0 else nullcontext()
            with torch.inference_mode(), without:
                return [self._of(text) for text in texts]
        finally:
            for name, slot in self._slots.items():
                slot.layer.scaling[slot.adapter] = trained[name]

    def _of(self, text: Sequence[int]) -> Doubles:
        import torch

        config = self._model.config.get_text_config()
        if max(text) >= config.vocab_size:
            raise ProbeError(
                f"the server's answer has token {max(text)}, but the base model has {config.vocab_size} tokens",
                "pass the model that the server runs with --model",
            )
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and len(text) > context:
            raise ProbeError(f"prompt and answer have {len(text)} tokens, but the model's context is {context}")
        tokens = torch.tensor([list(text)], device=self._model.device)
        scores = torch.log_softmax(self._model(input_ids=tokens).logits[0, :-1].float(), dim=-1)
        of_tokens: Doubles = scores.gather(1, tokens[0, 1:, None])[:, 0].double().cpu().numpy()
        return of_tokens
