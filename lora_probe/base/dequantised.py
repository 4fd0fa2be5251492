"""A quantised model as the plain weights that transformers makes of it.

In: a checkpoint. Out: the same if it is not quantised; otherwise one whose tensors lie in memory, under the names of
the live model, as its own `dequantize` gives them. Nothing is dequantised by hand: what transformers cannot undo here
is refused by name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_probe.base.checkpoint import Checkpoint, of_torch
from lora_probe.errors import ProbeError
from lora_probe.files.limits import importing


def dequantised(found: Checkpoint) -> Checkpoint:
    """`found` with plain weights.

    Raises:
        ProbeError: it is quantised, and transformers, or a library that it needs, cannot undo that here.
    """
    method = found.quantisation
    if method is None:
        return found
    try:
        model = _load(found)
    # transformers and the libraries of the methods raise whatever they like; the reason is passed on.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ProbeError(
            f"the weights in `{found.path}` are quantised ({method}), and transformers cannot dequantise them here: "
            f"{reason}",
            "install what the method needs, or give --model (or --merged) a copy that is not quantised",
        ) from error
    tensors = of_torch(model.state_dict(), found.path)
    # A live model has a tensor for the output head where the files of a tied one have none.
    config = {**found.config, "tie_word_embeddings": found.tied}
    return replace(found, config=config, tensors={tensor.name: tensor for tensor in tensors})


def _load(found: Checkpoint) -> Any:
    """The live model: dequantised while it is loaded where the method can, by `dequantize()` afterwards elsewhere."""
    with importing():
        from transformers import AutoModelForCausalLM
        from transformers.quantizers.auto import AutoQuantizationConfig

    settings = AutoQuantizationConfig.from_dict(dict(found.quantization_config or {}))
    if hasattr(settings, "dequantize"):
        settings.dequantize = True
        return AutoModelForCausalLM.from_pretrained(
            found.path, quantization_config=settings, dtype="auto", trust_remote_code=False
        )
    return AutoModelForCausalLM.from_pretrained(found.path, dtype="auto", trust_remote_code=False).dequantize()
