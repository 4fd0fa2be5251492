"""What a file called `adapter_config.json` describes when it is not a PEFT LoRA adapter.

In: its fields. Out: a `NotPeft`: what it is, and a hint; None for a PEFT LoRA config. Several libraries use this file
name, and users copy a model's `config.json` over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_probe.files import brief, shown

METHODS = {
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning",
    "P_TUNING": "p-tuning",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "IA3": "(IA)³",
    "ADALORA": "AdaLoRA, whose ranks are masked by a third factor",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "OFT": "orthogonal fine-tuning",
    "BOFT": "butterfly orthogonal fine-tuning",
    "HRA": "Householder reflections",
    "VERA": "VeRA, whose A and B are shared and random",
    "VBLORA": "VB-LoRA, whose vectors are in a shared bank",
    "RANDLORA": "RandLoRA, whose A and B are random",
    "XLORA": "X-LoRA, a mixture of LoRA adapters",
    "POLY": "Polytropon",
    "LN_TUNING": "tuned layer norms",
    "FOURIERFT": "Fourier coefficients",
    "BONE": "Bone",
    "MISS": "MiSS",
    "CPT": "context-aware prompt tuning",
    "TRAINABLE_TOKENS": "trained tokens",
    "SHIRA": "SHiRA, sparse changes",
    "C3A": "circular convolutions",
    "ROAD": "rotations",
    "WAVEFT": "wavelet coefficients",
}
"""PEFT's other common methods, in words."""
_FEW = """ADAMSS BEFT CARTRIDGE DEFT DELORA FROD GLORA GRALORA HIRA LILY OSF PEANUT PSOFT PVERA SHADOW SUPERTUNING
TINYLORA UNILORA"""
"""The other methods of PEFT 0.21."""

_MLX = {"fine_tune_type", "lora_parameters", "lora_layers"}
_ADAPTERHUB = {"model_class", "hidden_size", "model_name"}
_DIFFUSERS = ("_class_name", "_diffusers_version", "unet", "network_module", "network_dim", "network_alpha", "networks")
_JAX = ("jax", "flax", "orbax", "maxtext", "easylm", "tunix", "qwix")
_MODEL = {
    "architectures",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "hidden_act",
    "transformers_version",
}
_RECIPE = {
    "base_model",
    "datasets",
    "micro_batch_size",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
}
_OWN_WORDS = ("rank", "alpha", "lora", "target", "scaling")
PEFT_KEYS = {"r", "lora_alpha", "target_modules"}

_RESAVE = "lora-probe, PEFT and vLLM read PEFT LoRA adapters"


@dataclass(frozen=True)
class NotPeft:
    """What a config is instead: `what` is the end of a sentence that begins with its path, `key` the key that shows it,
    if there is one."""

    what: str
    hint: str
    key: str | None = None


def not_peft(raw: Mapping[str, Any]) -> NotPeft | None:
    """What the fields describe; None for a PEFT LoRA config."""
    kind = raw.get("peft_type")
    if kind is not None:
        return None if kind == "LORA" else _method(kind)
    keys = raw.keys()
    if keys & {"fine_tune_type", "lora_parameters"} or (keys & _MLX and not keys & PEFT_KEYS):
        return NotPeft(
            "is the config of an MLX adapter, not a PEFT config",
            "convert it (MLX stores lora_a and lora_b transposed, and `scale` instead of lora_alpha / r), "
            "or fuse it with mlx_lm.fuse and serve the model",
        )
    if "model_class" in keys or (isinstance(raw.get("config"), dict | str) and keys & _ADAPTERHUB):
        return NotPeft(
            f"is the config of an AdapterHub adapter ({_architecture(raw)}), not a PEFT config",
            "merge it with the adapters library; its weights have other names and shapes",
        )
    if keys & PEFT_KEYS:
        return None
    return _without_peft_keys(raw)


def _without_peft_keys(raw: Mapping[str, Any]) -> NotPeft:
    keys = raw.keys()
    if not keys:
        return NotPeft("is an empty object, not a PEFT config", "copy the adapter_config.json that PEFT wrote")
    image_keys = [name for name in _DIFFUSERS if name in keys] + [name for name in keys if name.startswith("ss_")]
    if image_keys:
        return NotPeft(
            f"is the config of an image model's LoRA (diffusers, kohya: it has `{shown(image_keys[0])}`), "
            "not a PEFT config",
            "load it with diffusers; lora-probe reads LoRA adapters of language models",
            image_keys[0],
        )
    if any(word in str(name).lower() for name in keys for word in _JAX):
        return NotPeft(
            f"is the config of an adapter made with JAX (it has {_some(raw)}), not a PEFT config",
            "export A and B under PEFT's names, with an adapter_config.json that has " + _needed(),
        )
    if len(keys & _MODEL) >= 2 or ("model_type" in keys and keys & _MODEL):
        return NotPeft(
            f"is the config of a whole model ({_model(raw)}), not a PEFT config",
            "copy the adapter_config.json that PEFT wrote; a model's config.json may have replaced it",
        )
    if len(keys & _RECIPE) >= 2:
        return NotPeft(
            f"is the recipe of a training run (it has {_some(raw)}), not a PEFT config",
            f"use the config that PEFT's save_pretrained writes next to the weights; it has {_needed()}",
        )
    own = [name for name in keys if any(word in str(name).lower() for word in _OWN_WORDS)]
    if own:
        return NotPeft(
            f"is not a PEFT config: it has custom keys (`{shown(own[0])}`) and none that PEFT writes",
            f"use PEFT's keys: {_needed()}",
            own[0],
        )
    return NotPeft(
        f"is not a PEFT config: it has no `peft_type`, `r` or `target_modules` (it has {_some(raw)})",
        f"check whether another library wrote it; {_RESAVE}",
    )


def _method(kind: object) -> NotPeft:
    if not isinstance(kind, str):
        return NotPeft(
            f"has the `peft_type` {brief(kind)}, which is not a PEFT method", 'write "peft_type": "LORA"', "peft_type"
        )
    if kind.upper() == "LORA":
        return NotPeft(
            f"has the `peft_type` {brief(kind)}, which PEFT does not accept: it must be LORA",
            'write "LORA"',
            "peft_type",
        )
    method = METHODS.get(kind, "another PEFT method" if kind in _FEW.split() else None)
    if method is None:
        return NotPeft(
            f"describes a {shown(kind, 60)} adapter, not LoRA, and PEFT 0.21 has no such method",
            "check whether it was written by a newer PEFT or is a typo; lora-probe reads only PEFT LoRA adapters",
            "peft_type",
        )
    return NotPeft(
        f"describes a {kind} adapter, not LoRA: {method}",
        "load it with PEFT; vLLM serves only LoRA adapters, and lora-probe reads only PEFT LoRA adapters",
        "peft_type",
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    inner = raw.get("config")
    name = inner.get("architecture") if isinstance(inner, dict) else inner
    return f"architecture {brief(name)}" if isinstance(name, str) else "unnamed architecture"


def _model(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else raw.get("model_type")
    return shown(name, 60) if isinstance(name, str) else "unnamed architecture"


def _some(raw: Mapping[str, Any]) -> str:
    names = [shown(str(name), 40) for name in list(raw)[:5]]
    return ", ".join(names) + (f" and {len(raw) - 5} more" if len(raw) > 5 else "")


def _needed() -> str:
    return "peft_type, r, lora_alpha, target_modules"
