"""What a file called `adapter_config.json` describes when it is not a PEFT LoRA adapter.

In: its fields. Out: a `NotPeft`: what it is, in a few words, and what to do; None where it is PEFT's. Several libraries
use the name, and people copy a model's `config.json` over it.
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
    "VBLORA": "VB-LoRA, whose vectors lie in a bank",
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
"""PEFT's other methods that people use, in words."""
_FEW = """ADAMSS BEFT CARTRIDGE DEFT DELORA FROD GLORA GRALORA HIRA LILY OSF PEANUT PSOFT PVERA SHADOW SUPERTUNING
TINYLORA UNILORA"""
"""The rest of those of PEFT 0.21."""

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

_RESAVE = "lora-probe, PEFT and vLLM read PEFT's LoRA adapters"


@dataclass(frozen=True)
class NotPeft:
    """What a config is instead: `what` ends a sentence that begins with its path, `key` is the key that shows it, where
    one does."""

    what: str
    hint: str
    key: str | None = None


def foreign(raw: Mapping[str, Any]) -> NotPeft | None:
    """What the fields describe; None for a LoRA adapter of PEFT."""
    kind = raw.get("peft_type")
    if kind is not None:
        return None if kind == "LORA" else _method(kind)
    keys = raw.keys()
    if keys & {"fine_tune_type", "lora_parameters"} or (keys & _MLX and not keys & PEFT_KEYS):
        return NotPeft(
            "is the config of an MLX adapter, not a PEFT config",
            "convert it (MLX stores lora_a and lora_b transposed, and `scale` in place of lora_alpha / r), "
            "or fuse it with mlx_lm.fuse and serve the model",
        )
    if "model_class" in keys or (isinstance(raw.get("config"), dict | str) and keys & _ADAPTERHUB):
        return NotPeft(
            f"is the config of an AdapterHub adapter ({_architecture(raw)}), not a PEFT config",
            "load it with the adapters library and merge it there; its weights have other names and shapes",
        )
    if keys & PEFT_KEYS:
        return None
    return _without_peft_keys(raw)


def _without_peft_keys(raw: Mapping[str, Any]) -> NotPeft:
    keys = raw.keys()
    if not keys:
        return NotPeft("is an empty object, not a PEFT config", "copy the adapter_config.json that PEFT wrote")
    words = [name for name in _DIFFUSERS if name in keys] + [name for name in keys if name.startswith("ss_")]
    if words:
        return NotPeft(
            f"is the config of an image model's LoRA (diffusers, kohya: it has `{shown(words[0])}`), not a PEFT config",
            "load it with diffusers; vLLM and PEFT serve LoRA adapters of language models here",
            words[0],
        )
    if any(word in str(name).lower() for name in keys for word in _JAX):
        return NotPeft(
            f"is the config of an adapter made with JAX (it has {_some(raw)}), not a PEFT config",
            "export A and B with their names in PEFT's form, and write PEFT's adapter_config.json: " + _needed(),
        )
    if len(keys & _MODEL) >= 2 or ("model_type" in keys and keys & _MODEL):
        return NotPeft(
            f"is the config of a whole model ({_model(raw)}), not a PEFT config",
            "was a model's config.json copied over it? copy the adapter_config.json that PEFT wrote",
        )
    if len(keys & _RECIPE) >= 2:
        return NotPeft(
            f"is the recipe of a training run (it has {_some(raw)}), not a PEFT config",
            f"PEFT's save_pretrained writes the config beside the weights; it needs {_needed()}",
        )
    own = [name for name in keys if any(word in str(name).lower() for word in _OWN_WORDS)]
    if own:
        return NotPeft(
            f"has keys of somebody's own (`{shown(own[0])}`), and none that PEFT writes: it is not a PEFT config",
            f"write them as PEFT does: {_needed()}",
            own[0],
        )
    return NotPeft(
        f"is not a PEFT config: it has no `peft_type`, `r` or `target_modules` (it has {_some(raw)})",
        f"is this an adapter of another library? {_RESAVE}",
    )


def _method(kind: object) -> NotPeft:
    if not isinstance(kind, str):
        return NotPeft(
            f"has the `peft_type` {brief(kind)}, which is no method of PEFT's", 'write "peft_type": "LORA"', "peft_type"
        )
    if kind.upper() == "LORA":
        return NotPeft(
            f"has the `peft_type` {brief(kind)}, which PEFT does not know: it knows LORA", 'write "LORA"', "peft_type"
        )
    words = METHODS.get(kind, "another method of PEFT's" if kind in _FEW.split() else None)
    if words is None:
        return NotPeft(
            f"describes a {shown(kind, 60)} adapter, not LoRA, and PEFT 0.21 knows no such method",
            "is it of a newer PEFT, or a slip of the pen? lora-probe reads PEFT LoRA adapters only",
            "peft_type",
        )
    return NotPeft(
        f"describes a {kind} adapter, not LoRA: {words}",
        "PEFT loads it, vLLM serves none but LoRA adapters; lora-probe reads PEFT LoRA adapters only",
        "peft_type",
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    inner = raw.get("config")
    name = inner.get("architecture") if isinstance(inner, dict) else inner
    return f"architecture {brief(name)}" if isinstance(name, str) else "of an unnamed architecture"


def _model(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else raw.get("model_type")
    return shown(name, 60) if isinstance(name, str) else "of an unnamed kind"


def _some(raw: Mapping[str, Any]) -> str:
    names = [shown(str(name), 40) for name in list(raw)[:5]]
    return ", ".join(names) + (f" and {len(raw) - 5} more" if len(raw) > 5 else "")


def _needed() -> str:
    return "peft_type, r, lora_alpha, target_modules"
