"""Models and tokenizers loaded by transformers, or its error message.

In: a folder or an id, the name of a dtype. Out: live objects. torch and transformers are imported when something is
loaded. Code that comes with a model is never imported.
"""

from __future__ import annotations

from typing import Any

from lora_probe.adapter import Adapter
from lora_probe.base import Shapes
from lora_probe.engines.peft.classes import class_of
from lora_probe.errors import EngineFailed
from lora_probe.recording import Floats
from lora_probe.rules.labels import labels_in


def load_model(name: str, dtype: str = "auto", what: str = "base model", adapter: Adapter | None = None) -> Any:
    """The model `name`, on the accelerator if there is one: a causal language model, or what the task of `adapter`
    asks for. `auto` is the dtype of the files, `what` is the name of the model in messages.

    Raises:
        EngineFailed: with the message of transformers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "trust_remote_code": False}
    try:
        cls = AutoModelForCausalLM
        if adapter is not None:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            cls = class_of(config, adapter.config.trained_as) or cls
            if (labels := labels_in(adapter)) is not None:
                options["num_labels"] = labels
        model = cls.from_pretrained(name, **options)
    # transformers may raise any exception; its message is passed on and the run ends.
    except Exception as error:
        raise _cannot_load(what, name, error) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of the model `name`. Raises the same errors as `load_model`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise _cannot_load("tokenizer of the base model", name, error) from error


def _cannot_load(what: str, name: str, error: Exception) -> EngineFailed:
    return EngineFailed(
        f"transformers cannot load the {what} `{name}`: {first_lines(error)}",
        "pass a folder or a cached model with --model" if "base model" in what else "",
    )


def shapes_of(model: Any) -> Shapes:
    """The modules that PEFT can adapt, by the names of the live model: path -> (out, in)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    shapes: dict[str, tuple[int, int] | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # A quantised Linear packs its weight, but its features keep the original sizes.
            shapes[name] = module.out_features, module.in_features
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = module.num_embeddings, module.embedding_dim
        elif isinstance(module, Conv1D):
            shapes[name] = int(module.weight.shape[1]), int(module.weight.shape[0])
    return shapes


def generates(model: Any) -> bool:
    """Whether a model's answer is tokens; that of a classifier or an encoder is numbers."""
    return bool(getattr(model, "can_generate", bool)())


def encodes(model: Any) -> bool:
    """Whether a model's encoder reads the prompt, and its decoder answers."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def next_logprobs(logits: Any, count: int) -> Floats:
    """The log-probabilities of the last `count` rows of `logits: [1, rows, vocabulary]`, as float32."""
    import torch

    rows: Floats = torch.log_softmax(logits[0, -count:].float(), dim=-1).cpu().numpy()
    return rows


def dtype_of(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def first_lines(error: BaseException) -> str:
    """The first two lines of an exception's message as one line. A size mismatch has its tensor in the second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return short(" ".join(lines[:2]) if lines else type(error).__name__)


def short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
