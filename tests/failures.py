"""Adapters with known real-world failures, each made from a healthy one by the damage that caused it.

`FAILURES` maps a name to a maker, the codes of the rules that must report it, and its entry in the catalogue of real
failures. `HEALTHY` maps a name to the settings of adapters that no rule may report. Adapters with other settings are
saved by PEFT itself (conftest's `save_adapter`), or written as it does (`written.write_adapter`), which is fast.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from written import Tensors, edited, write_adapter

LAYERS = 3
Save = Callable[..., Path]
"""`save_adapter(folder, base, **settings)`, or `write_adapter`."""


Maker = Callable[[Path, Path, Path, Save], Path]


@dataclass(frozen=True)
class Failure:
    """`codes` are the error-level rules that must speak, no other. `trained`: it is no copy of the healthy one, so that
    it matters who saves it."""

    maker: Maker
    codes: tuple[str, ...]
    trained: bool

    def make(self, healthy: Path, base: Path, folder: Path, save: Save = write_adapter) -> Path:
        return self.maker(healthy, base, folder, save)


FAILURES: dict[str, Failure] = {}


def failure(name: str, *codes: str, trained: bool = False) -> Callable[[Maker], None]:
    def register(make: Maker) -> None:
        assert name not in FAILURES
        FAILURES[name] = Failure(make, codes, trained)

    return register


def _by_tensors(name: str, edit: Callable[[Tensors], Tensors], *codes: str) -> None:
    failure(name, *codes)(lambda healthy, base, folder, save: edited(healthy, folder, edit))


def _by_config(name: str, *codes: str, **changes: Any) -> None:
    failure(name, *codes)(lambda healthy, base, folder, save: edited(healthy, folder, config=lambda raw: raw | changes))


def _by_training(name: str, *codes: str, **settings: Any) -> None:
    failure(name, *codes, trained=True)(lambda healthy, base, folder, save: save(folder, base, **settings))


def token_ids(base: Path, text: str) -> list[int]:
    """The tokenizer of the tests has a token for each byte."""
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    return [vocabulary[letter] for letter in text]


def _renamed(old: str, new: str, count: int = 1) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new, count): tensor for name, tensor in tensors.items()}


def _only(keep: Callable[[str], bool]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if keep(name)}


def _each(change: Callable[[str, Any], Any]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(name, tensor) for name, tensor in tensors.items()}


Q0 = "model.layers.0.self_attn.q_proj"
LAST = f"model.layers.{LAYERS - 1}.self_attn.q_proj"
"""A module whose NaN does not reach the input of any other module."""

# A. the file
_by_tensors("A01-empty", _only(lambda name: False), "LP209")
_by_tensors("A02-flat", _each(lambda name, t: t.flatten()[:100]), "LP206")
_by_tensors("A02-size-0", _each(lambda name, t: t[:0, 0] if Q0 in name else t), "LP206")
_by_tensors("A05-nan", _each(lambda name, t: t * float("nan") if f"{LAST}.lora_B" in name else t), "LP205")
_by_tensors("A05-infinite", _each(lambda name, t: t + float("inf") if f"{LAST}.lora_A" in name else t), "LP205")
_by_tensors("A06-zero", _each(lambda name, t: t * 0 if "lora_B" in name else t), "LP203")
_by_tensors("A06-zero-in-part", _each(lambda name, t: t * 0 if "layers.1" in name and "lora_B" in name else t), "LP203")
_by_tensors("A07-no-A", _only(lambda name: f"{Q0}.lora_A" not in name), "LP202")
_by_tensors("A07-no-B", _only(lambda name: f"{Q0}.lora_B" not in name), "LP202")
_by_tensors("A08-layer-missing", _only(lambda name: "layers.1" not in name), "LP204")
_by_tensors("A08-module-missing", _only(lambda name: "layers.2.self_attn.v_proj" not in name), "LP204")

# B. the config against the tensors
_by_config("B01-r-larger", "LP201", r=16)
_by_config("B01-r-smaller", "LP201", r=4)
_by_config("B03-alpha-0", "LP203", lora_alpha=0)
failure("B03-alpha-missing", "LP103")(
    lambda healthy, base, folder, save: edited(
        healthy, folder, config=lambda raw: {key: value for key, value in raw.items() if key != "lora_alpha"}
    )
)
failure("B03-peft-type-missing", "LP103")(
    lambda healthy, base, folder, save: edited(
        healthy, folder, config=lambda raw: {key: value for key, value in raw.items() if key != "peft_type"}
    )
)
failure("B06-targets-missing", "LP103")(
    lambda healthy, base, folder, save: edited(
        healthy, folder, config=lambda raw: {key: value for key, value in raw.items() if key != "target_modules"}
    )
)
_by_config("B06-narrower", "LP106", target_modules=["q_proj"])
_by_config("B06-layers", "LP106", layers_to_transform=[0, 1])
_by_config("B06-excluded", "LP106", exclude_modules=["v_proj"])
_by_config("B06-nothing", "LP107", target_modules=["query_key_value"])
_by_config("B06-excluded-by-name", "LP106", exclude_modules=["v_proj"])
_by_config("B06-pattern", "LP107", layers_to_transform=[0, 1, 2], layers_pattern="blocks")
_by_config("B06-another", "LP113", r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"])
_by_config("B06-wider", "LP204", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
_by_training("B08-dora", "LP406", use_dora=True)
failure("B08-dora-flag-off", "LP211", trained=True)(
    lambda healthy, base, folder, save: edited(
        save(folder.with_name(folder.name + "-whole"), base, use_dora=True),
        folder,
        config=lambda raw: raw | {"use_dora": False},
    )
)
_by_config("B08-dora-without-vectors", "LP220", use_dora=True)
_by_training("B10-lora-bias", "LP406", lora_bias=True)
failure("B10-lora-bias-flag-off", "LP211", trained=True)(
    lambda healthy, base, folder, save: edited(
        save(folder.with_name(folder.name + "-whole"), base, lora_bias=True),
        folder,
        config=lambda raw: raw | {"lora_bias": False},
    )
)
_by_config("B09-bias-flag", "LP406", bias="lora_only")
_by_training("B11-saved-head", "LP406", modules_to_save=["lm_head"])
_by_config("B11-head-not-saved", "LP212", modules_to_save=["lm_head"])
_by_training("B11-saved-norms", "LP406", modules_to_save=["norm"])
failure("B11-head-unsaid", "LP210")(
    lambda healthy, base, folder, save: edited(
        healthy,
        folder,
        lambda tensors: tensors | {"base_model.model.lm_head.weight": np.ones((288, 128), np.float32)},
    )
)
_by_training("B13-pissa", "LP406", init_lora_weights="pissa")
_by_training("B13-olora", "LP406", init_lora_weights="olora")
_by_training("B15-pissa-niter", "LP109", init_lora_weights="pissa_niter_4")
_by_config("B16-lora-ga", "LP109", init_lora_weights="lora_ga")
_by_config("B13-unknown-init", "LP111", init_lora_weights="gausian")
_by_config("B18-arrow", "LP110", arrow_config={"top_k": 2})
failure("B20-alora", "LP406")(
    lambda healthy, base, folder, save: edited(
        healthy, folder, config=lambda raw: raw | {"alora_invocation_tokens": token_ids(base, "Hi")}
    )
)
_by_config("B21-layer-replication", "LP406", layer_replication=[[0, 2], [1, 3]])
_by_training("B22-trained-tokens", "LP210", trainable_token_indices={"embed_tokens": [5, 7]})

_by_config("B06-expression-and-layers", "LP112", target_modules=r".*\.[qkv]_proj", layers_to_transform=[0, 1, 2])
_by_config("task-type-in-lower-case", "LP112", task_type="causal_lm")
_by_config("rank-as-float", "LP112", r=8.0)
_by_config("bias-null", "LP112", bias=None)
_by_config("init-in-upper-case", "LP111", init_lora_weights="PiSSA")
_by_config("whole-path-beside-layers", "LP106", target_modules=[Q0, "k_proj", "v_proj"], layers_to_transform=[1])
_by_tensors("A-and-B-of-different-ranks", _each(lambda name, t: t[:4] if f"{Q0}.lora_A" in name else t), "LP206")
_by_tensors("saved-without-weight-in-names", _renamed(".weight", ""), "LP221")

failure("half-of-an-embedding-under-another-name", "LP221", trained=True)(
    lambda healthy, base, folder, save: edited(
        save(folder.with_name(f"{folder.name}-whole"), base, target_modules=["q_proj", "embed_tokens"]),
        folder,
        _renamed("lora_embedding_B", "lora_B.weight"),
    )
)

# C. names and the base
_by_tensors("C01-text-names", _renamed("model.layers", "model.language_model.layers"), "LP302")
_by_tensors("C01-no-model", _renamed("model.layers", "layers"), "LP302")
_by_tensors("C02-other-prefix", _renamed("model.layers", "language_model.model.layers"), "LP302")
_by_tensors("C03-orig-mod-outside", _renamed("base_model.model.", "base_model.model._orig_mod."), "LP213")
_by_tensors("C03-orig-mod-inside", _renamed("self_attn", "_orig_mod.self_attn"), "LP213")
_by_tensors("C03-ddp", _renamed("model.layers", "module.model.layers"), "LP213")
_by_tensors("C03-fsdp", _renamed("layers.", "_fsdp_wrapped_module.layers."), "LP213")
_by_tensors(
    "C03-checkpointing-in-part",
    lambda tensors: {
        name.replace("self_attn", "_checkpoint_wrapped_module.self_attn") if "layers.1" in name else name: tensor
        for name, tensor in tensors.items()
    },
    "LP213",
)
_by_tensors("C04-twice-wrapped", _renamed("base_model.model.", "base_model.model.base_model.model."), "LP214")
_by_tensors("C06-no-prefix", _renamed("base_model.model.", ""), "LP215")
_by_tensors("C08-smaller-base", _each(lambda name, t: t[:, :96] if "lora_A" in name else t), "LP301")
_by_tensors("C08-larger-base", _each(lambda name, t: np.tile(t, (1, 2) if "lora_A" in name else (2, 1))), "LP301")
_by_tensors("C14-fused", _renamed("q_proj", "qkv_proj"), "LP325")
_by_tensors("C14-unknown-word", _renamed("v_proj", "foo_proj"), "LP325")
_by_tensors("C14-other-word", _renamed("self_attn", "attention"), "LP325")
_by_tensors("C03-base-layer", _renamed(".lora_", ".base_layer.lora_"), "LP213")
_by_tensors(
    "C17-layer-too-many",
    lambda tensors: (
        tensors | {name.replace("layers.0", f"layers.{LAYERS}"): t for name, t in tensors.items() if "layers.0" in name}
    ),
    "LP303",
)
_by_tensors("C21-transposed", _each(lambda name, t: t.T if "lora_A" in name else t), "LP206")
_by_tensors("adapter-name-in-keys", _renamed("lora_A.weight", "lora_A.default.weight"), "LP219")
_by_tensors(
    "another-adapter-name-in-keys",
    lambda tensors: {
        name.replace("lora_A.weight", "lora_A.mine.weight").replace("lora_B.weight", "lora_B.mine.weight"): tensor
        for name, tensor in tensors.items()
    },
    "LP219",
)
_by_config("D01-rank-above-limit", "LP201", r=64)


def _resized(tensors: Tensors) -> Tensors:
    """Tokens were added before training, and PEFT saved both embeddings along."""
    numbers = np.random.default_rng(0)
    return tensors | {
        f"base_model.model.{name}.weight": numbers.normal(size=(300, 128)).astype(np.float32)
        for name in ("model.embed_tokens", "lm_head")
    }


_by_tensors("C11-resized", _resized, "LP308")


def _wider(name: str, tensor: Any) -> Any:
    return np.concatenate([tensor, tensor[:, :12]], axis=1) if name.endswith("lora_embedding_A") else tensor


failure("C11-pair-on-resized-embeddings", "LP301", "LP308", trained=True)(
    lambda healthy, base, folder, save: edited(
        save(folder.with_name(f"{folder.name}-whole"), base, target_modules=["embed_tokens"]),
        folder,
        _each(_wider),
    )
)


def _twice(tensors: Tensors) -> Tensors:
    return tensors | {name.removeprefix("base_model.model."): tensor * 2 for name, tensor in tensors.items()}


_by_tensors("twice-with-and-without-prefix", _twice, "LP216")

_by_tensors(
    "twice-with-doubled-prefix",
    lambda tensors: tensors | {f"base_model.model.{name}": tensor * 2 for name, tensor in tensors.items()},
    "LP216",
)

HEALTHY: dict[str, dict[str, Any]] = {
    "q-k-v": {},
    "q-alone": {"target_modules": ["q_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*\.(0|2)\.self_attn\.[qv]_proj"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
    "full-path-patterns": {"rank_pattern": {"model.layers.0.self_attn.q_proj": 4}},
    "layers-to-transform": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "no-dropout-no-task": {"lora_dropout": 0.1, "task_type": None},
    "rank-1": {"r": 1, "lora_alpha": 1},
    "rank-7": {"r": 7, "lora_alpha": 16.0},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 16},
}


def as_bin(source: Path, target: Path) -> Path:
    """The same adapter with a pickle instead of its safetensors file."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    torch.save(load_file(path), target / "adapter_model.bin")
    path.unlink()
    return target


def write_config(folder: Path, raw: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    return folder


def _scrubbed(init: str) -> Maker:
    """Someone wrote `true` over the initialisation, so that vLLM takes the adapter."""

    def make(healthy: Path, base: Path, folder: Path, save: Save) -> Path:
        whole = save(folder.with_name(f"{folder.name}-whole"), base, init_lora_weights=init, trained=0.02)
        return edited(whole, folder, config=lambda raw: raw | {"init_lora_weights": True})

    return make


failure("B14-pissa-scrubbed", "LP317", trained=True)(_scrubbed("pissa"))
failure("B14-olora-scrubbed", "LP317", trained=True)(_scrubbed("olora"))
