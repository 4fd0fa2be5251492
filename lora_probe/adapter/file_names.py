"""The names that the files of an adapter have, and those that other libraries and copies have.

In: a file's name. Out: whether a loader looks for it, and what else it looks like.
"""

from __future__ import annotations

import re

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE, VLLM_PICKLE = "adapter_model.bin", "adapter_model.pt"
LOADED = (WEIGHTS, PICKLE, VLLM_PICKLE)
"""The names that loaders look for, in order. PEFT accepts the first two, vLLM all three."""

SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json")
_NUMBER = r"\s*(?:\(\d+\)|- copy|copy)?\s*(?:\(\d+\))?"
COPY = re.compile(rf"adapter_model{_NUMBER}\.(safetensors|bin|pt)", re.IGNORECASE)
CONFIG_COPY = re.compile(rf"adapter_config{_NUMBER}\.json(\.txt|\.bak|\.download)?", re.IGNORECASE)
_WEIGHTS_LIKE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state.*|scaler|random_states.*)\.(bin|pt|pth)")

BY_OTHERS: dict[str, tuple[str, str]] = {
    "adapters.safetensors": (
        "MLX's name",
        "convert it; renaming is not enough, because MLX stores lora_a and lora_b transposed",
    ),
    "adapters.npz": ("MLX's name", "convert it; MLX stores lora_a and lora_b transposed"),
    "pytorch_lora_weights.safetensors": ("diffusers' name", f"load it with diffusers; PEFT reads {WEIGHTS}"),
    "pytorch_adapter.bin": ("AdapterHub's name", "load it with the adapters library; PEFT reads another format"),
    "model.safetensors": ("the name of a whole model", "serve it without an adapter if it is a merged model"),
    "pytorch_model.bin": ("the name of a whole model", f"rename it to {PICKLE} if it holds lora_A and lora_B"),
}
"""Names of other libraries, whose they are, and a hint: for files whose content does not show it."""


def like_weights(name: str) -> bool:
    """Whether a file of this name could hold weights."""
    return name.lower().endswith(_WEIGHTS_LIKE) and not _NOT_WEIGHTS.fullmatch(name)
