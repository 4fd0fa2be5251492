"""Real merges for the tests: tiny bases of several kinds, adapters on them, PEFT's merges, and damage done to those."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import LAYERS, SIZES

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
SMALL_GPT2 = {"vocab_size": 288, "n_embd": 128, "n_layer": LAYERS, "n_head": 4, "n_positions": 512}


def save_model(folder: Path, kind: str, dtype: str = "float32", seed: int = 0) -> Path:
    """A tiny random base: llama, tied (a llama whose output head is its embedding), wide (as many key heads as query
    heads), qwen2 (with biases), gpt2 (Conv1D), moe and mixtral (fused experts that lie in the file one by one, in
    mixtral's under other names)."""
    import torch
    import transformers as t

    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
        "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "wide": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES | {"num_key_value_heads": 4})),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**SMALL_GPT2, bos_token_id=0, eos_token_id=256)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
        "moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **EXPERTS)),
    }
    torch.manual_seed(seed)
    model = makers[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def save_adapter_of(
    folder: Path, base: Path, dtype: str = "float32", strength: float = 0.05, seed: int = 1, **config: Any
) -> Path:
    """An adapter with nonzero values in all trainable tensors. `strength`: the standard deviation of lora_B."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, **config}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=strength)
        elif "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif "lora_" not in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def merge_by_peft(
    folder: Path, adapter: Path, base: Path, dtype: str, safe: bool = False, autocast: bool = True, **save: Any
) -> Path:
    """Merge as a user does: load, merge_and_unload, save_pretrained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    peft_model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=autocast)
    peft_model.merge_and_unload(safe_merge=safe).save_pretrained(folder, **save)
    return folder


Tensors = dict[str, Any]


def damaged(source: Path, target: Path, edit: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a merged model with other tensors, and other entries in its config."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    changed = edit(load_file(target / "model.safetensors"))
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in changed.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target
