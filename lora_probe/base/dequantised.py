"""A quantised model as the plain weights that transformers makes of it.

In: a checkpoint. Out: the same if it is not quantised; otherwise one whose tensors are in memory, under the names of
the live model, as its own `dequantize` returns them. Nothing is dequantised by hand: a method that transformers cannot
undo here is an error that names it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_probe.base.checkpoint import Checkpoint, of_torch
from lora_probe.errors import ProbeError
from lora_probe.files.limits import importing


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with plain weights.

    Raises:
        ProbeError: it is quantised, and transformers, or a library that it needs, cannot undo that here.
    """
    method = checkpoint.quantisation
    if method is None:
        return checkpoint
    try:
        model = _load(checkpoint)
    # transformers and the libraries of the methods raise exceptions of any type; the reason is passed on.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ProbeError(
            f"the weights in `{checkpoint.path}` are quantised ({method}), and transformers cannot dequantise them "
            f"here: {reason}",
            "install what the method needs, or pass a copy that is not quantised with --model or --merged",
        ) from error
    tensors = of_torch(model.state_dict(), checkpoint.path)
    # A live model has a tensor for a tied output head; its files have none.
    config = {**checkpoint.config, "tie_word_embeddings": checkpoint.tied}
    return replace(checkpoint, config=config, tensors={tensor.name: tensor for tensor in tensors})


def _load(checkpoint: Checkpoint) -> Any:
    """The live model: dequantised during loading if the method can do that, else by `dequantize()` afterwards."""
    with importing():
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AutoQuantizationConfig

    settings = AutoQuantizationConfig.from_dict(dict(checkpoint.quantization_config or {}))
    if hasattr(settings, "dequantize"):
        settings.dequantize = True
        return AutoModelForCausalLM.from_pretrained(
            checkpoint.path, quantization_config=settings, dtype="auto", trust_remote_code=False
        )
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto", trust_remote_code=False).dequantize()
