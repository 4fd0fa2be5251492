"""A PEFT model whose modules run with the weights of either of two runs.

In: a `BisectSpec`. Out: the most likely next token for a set of modules that run as in the candidate.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lora_probe.engines.mixtures import BisectSpec
from lora_probe.engines.peft.models import first_lines, load_model
from lora_probe.errors import EngineFailed

REFERENCE, CANDIDATE = "reference", "candidate"


class Mixture:
    """The model, with both adapters in it.

    Raises:
        EngineFailed: with the message of transformers or PEFT.
    """

    def __init__(self, spec: BisectSpec) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        self._ids = spec.ids
        self._sides = {REFERENCE: spec.reference, CANDIDATE: spec.candidate}
        model = load_model(spec.model, spec.dtype)
        try:
            self._model = PeftModel.from_pretrained(model, spec.reference.folder, adapter_name=REFERENCE)
            self._model.load_adapter(spec.candidate.folder, adapter_name=CANDIDATE)
        # PEFT may raise any exception; its message is passed on.
        except Exception as error:
            raise EngineFailed(f"PEFT cannot load both adapters: {first_lines(error)}") from error
        self._model.eval()
        base = self._model.get_base_model()
        self._layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
        for name, side in self._sides.items():
            for module, factor in side.factors.items():
                if (layer := self._layers.get(module)) is not None:
                    layer.scaling[name] *= factor

    def next_token(self, changed: Collection[str]) -> int:
        """The most likely next token if these modules run as in the candidate."""
        import torch

        for name, layer in self._layers.items():
            active = CANDIDATE if name in changed else REFERENCE
            has = active in layer.lora_A or active in layer.lora_embedding_A
            layer.set_adapter([active] if has and name not in self._sides[active].off else [])
        ids = torch.tensor([self._ids], device=next(self._model.parameters()).device)
        with torch.inference_mode():
            logits: Any = self._model(input_ids=ids).logits
        return int(logits[0, -1].argmax())
