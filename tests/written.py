"""Bases and adapters as Transformers and PEFT save them, written with numpy alone: for tests that must be fast.

In: recordings of real ones by `record_views.py` (tests/data): configs, the shapes of the weights, and the answers of
both engines. Out: folders that real engines load; `test_recorded.py` compares them with those that PEFT saves. The
answers are written to the cache of `check`, so that no engine runs for these bases.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from lora_probe.adapter import TrainedAs
from lora_probe.base import EngineView, open_base
from lora_probe.engines.remembered import _DECIDING, _installed, keys_of, remember
from lora_probe.errors import ProbeError

DATA = Path(__file__).parent / "data"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Edit = Callable[[dict[str, Any]], dict[str, Any]]


def write_base(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A tiny random base in float32, with a tokenizer whose tokens are bytes. `changes` go into its config.json.

    A kind without recorded shapes has a config alone.
    """
    source = DATA / kind
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("shapes.json", "views.json"))
    if changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    if (source / "shapes.json").exists():
        shutil.copytree(DATA / "tokenizer", folder, dirs_exist_ok=True)
        numbers = np.random.default_rng(0)
        shapes = json.loads((source / "shapes.json").read_text())
        save_file({name: _weight(name, shape, numbers) for name, shape in shapes.items()}, folder / "model.safetensors")
    _written.append((folder, kind))
    remember_answers(folder, kind)
    return folder


def _weight(name: str, shape: list[int], numbers: np.random.Generator) -> Array:
    if len(shape) == 1:
        return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
    return numbers.normal(0, 0.02, shape).astype(np.float32)


_written: list[tuple[Path, str]] = []
_state: list[Any] = [None]


def keep_answers() -> None:
    """Remember them again where what decides about that has changed: an engine in this process sets variables, and
    somebody may install something while the tests run."""
    variables = sorted((k, v) for k, v in os.environ.items() if k.startswith((*_DECIDING, "XDG_CACHE_HOME")))
    state = variables, _installed()
    if state != _state[0]:
        _state[0] = state
        for folder, kind in _written:
            # Some bases are gone, others were damaged on purpose.
            with suppress(ProbeError):
                remember_answers(folder, kind)


def remember_answers(folder: Path, kind: str) -> None:
    """Put the recorded answers about bases of that kind where `check` looks for them."""
    base = open_base(str(folder))
    for engine, answers in _answers(kind).items():
        for task in TASKS:
            answer = answers.get(task, answers["CAUSAL_LM"] if engine == "vllm" or task == "" else None)
            for trained in (TrainedAs(task or None), *([_mapping(folder)] if task == "" else [])):
                if answer is not None:
                    (key,) = keys_of(base, [engine], trained).values()
                    remember(key, answer.replace("FOLDER", str(folder)) if isinstance(answer, str) else answer)


def _mapping(folder: Path) -> TrainedAs:
    """How PEFT writes down the class of a base where no task implies one."""
    return TrainedAs(None, json.loads((folder / "config.json").read_text())["architectures"][0])


def remember_answer(folder: Path, engine: str, answer: EngineView | str) -> None:
    """Put another answer of an engine about that base there; a text says why it has none."""
    (key,) = keys_of(open_base(str(folder)), [engine], TrainedAs("CAUSAL_LM")).values()
    remember(key, answer)


TASKS = ("CAUSAL_LM", "", "SEQ_CLS", "causal_lm")
"""What adapters of the tests name; vLLM has the same answer for all of them."""


@cache
def _answers(kind: str) -> dict[str, dict[str, EngineView | str]]:
    return msgspec.json.decode((DATA / kind / "views.json").read_bytes(), type=dict[str, dict[str, EngineView | str]])


def recorded_view(kind: str, engine: str, task: str = "CAUSAL_LM") -> EngineView:
    """What a real engine has for a base of that kind."""
    view = _answers(kind)[engine][task]
    assert isinstance(view, EngineView)
    return view


def write_adapter(folder: Path, base: Path, seed: int = 1, trained: float = 0.05, **settings: Any) -> Path:
    """An adapter as PEFT saves it, with a lora_B that has learned something: `trained` is how far it has moved."""
    raw = json.loads((DATA / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)} | settings
    if raw["task_type"] is None:
        kind = json.loads((base / "config.json").read_text())["model_type"]
        library = f"transformers.models.{kind}.modeling_{kind}"
        raw["auto_mapping"] = {"base_model_class": _mapping(base).model_class, "parent_library": library}
    weights = _weights(base)
    modules = [name.removesuffix(".weight") for name, values in weights.items() if values.ndim == 2]
    targets = [name for name in modules if _targets(raw, name)]
    if raw["target_modules"] == "all-linear":
        raw["target_modules"] = sorted({name.rpartition(".")[2] for name in targets})
    numbers = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name in targets:
        tensors |= dict(_pair(raw, name, weights[f"{name}.weight"], numbers, trained))
    for name in modules if raw["modules_to_save"] else ():
        if name.rpartition(".")[2] in raw["modules_to_save"]:
            tensors[f"{name}.weight"] = weights[f"{name}.weight"]
    for name in weights if raw["modules_to_save"] == ["norm"] else ():
        if "norm" in name:
            tensors[name] = weights[name]
    for name, tokens in (raw["trainable_token_indices"] or {}).items():
        wide = weights[f"model.{name}.weight"].shape[1]
        tensors[f"model.{name}.token_adapter.trainable_tokens_delta"] = _normal(numbers, (len(tokens), wide), 0.02)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(raw, indent=2, sort_keys=True))
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    stored = {PREFIX + name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    return folder


def _weights(base: Path) -> Tensors:
    """Those of a base; of one that has a config alone, zeros in the shapes that PEFT has."""
    if (base / "model.safetensors").exists():
        return load_file(base / "model.safetensors")
    kind = next(kind for folder, kind in _written if folder == base)
    modules = recorded_view(kind, "peft").modules.items()
    return {f"{name}.weight": np.zeros(m.shape or ()) for name, m in modules if m.kind == "linear" and not m.why_not}


def _targets(raw: dict[str, Any], name: str) -> bool:
    """What `LoraConfig` means by target_modules, as far as these adapters use it."""
    wanted, excluded = raw["target_modules"], raw["exclude_modules"]
    if excluded is not None and re.fullmatch(excluded, name):
        return False
    if wanted == "all-linear":
        return name not in (EMBEDDING, HEAD)
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    layers = raw["layers_to_transform"]
    if layers is not None and not any(f".layers.{layer}." in name for layer in layers):
        return False
    return any(name == word or name.endswith(f".{word}") for word in wanted)


def _pair(
    raw: dict[str, Any], name: str, weight: Array, numbers: np.random.Generator, trained: float
) -> Iterator[tuple[str, Array]]:
    rank = next((r for end, r in raw["rank_pattern"].items() if name == end or name.endswith(f".{end}")), raw["r"])
    # A Conv1D keeps its weight the other way round.
    out, wide = weight.shape[::-1] if raw["fan_in_fan_out"] else weight.shape
    if name == EMBEDDING:
        yield f"{name}.lora_embedding_A", _normal(numbers, (rank, out), 0.05)
        yield f"{name}.lora_embedding_B", _normal(numbers, (wide, rank), 1.0)
    else:
        a, b = _begun(raw, weight, rank, out, wide, numbers)
        yield f"{name}.lora_A.weight", a
        yield f"{name}.lora_B.weight", b + _normal(numbers, b.shape, trained)
    if name in (EMBEDDING, HEAD):
        # PEFT saves the whole of an adapted embedding along.
        yield f"{name}.base_layer.weight", weight
    if raw["use_dora"]:
        yield f"{name}.lora_magnitude_vector", np.linalg.norm(weight, axis=1)
    if raw["lora_bias"]:
        yield f"{name}.lora_B.bias", np.zeros(out, np.float32)


def _begun(
    raw: dict[str, Any], weight: Array, rank: int, out: int, wide: int, numbers: np.random.Generator
) -> tuple[Array, Array]:
    """A and B before training: parts of the base for PiSSA and OLoRA, else random and zero."""
    init, scaling = str(raw["init_lora_weights"]).lower(), raw["lora_alpha"] / rank
    if init.startswith("pissa"):
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(s[:rank] / scaling)
        return root[:, None] * v[:rank], u[:, :rank] * root
    if init == "olora":
        q, r = np.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    return _normal(numbers, (rank, wide), wide**-0.5), np.zeros((out, rank))


def _normal(numbers: np.random.Generator, shape: tuple[int, ...], deviation: float) -> Array:
    return numbers.normal(0, deviation, shape)


def edited(source: Path, target: Path, tensors: Edit | None = None, config: Edit | None = None) -> Path:
    """A copy of an adapter with other tensors or another config. `tensors` maps names to numpy arrays."""
    shutil.copytree(source, target)
    if tensors is not None:
        changed = tensors(load_file(target / WEIGHTS))
        save_file({name: np.array(tensor, order="C") for name, tensor in changed.items()}, target / WEIGHTS)
    if config is not None:
        path = target / "adapter_config.json"
        path.write_text(json.dumps(config(json.loads(path.read_text()))))
    return target


def _e4m3(tensor: Array) -> Array:
    """The nearest float8_e4m3fn of each value, as its bits: 4 bits of exponent, 3 of mantissa."""
    fraction, exponent = np.frexp(np.abs(tensor).astype(np.float64))
    normal = (exponent + 6) * 8 + np.round(fraction * 16 - 8)
    small = np.round(np.abs(tensor) * 2.0**9)
    return (np.where(exponent > -6, normal, small) + 128 * (tensor < 0)).astype(np.uint8)


def in_dtype(source: Path, target: Path, dtype: str) -> Path:
    """The same adapter in float16, int8, or a dtype which numpy does not have: bfloat16, float8_e5m2, float8_e4m3fn."""
    if dtype == "float16":
        return edited(source, target, lambda tensors: {n: t.astype(np.float16) for n, t in tensors.items()})
    if dtype == "int8":
        return edited(source, target, lambda tensors: {n: (t * 100).astype(np.int8) for n, t in tensors.items()})
    shutil.copytree(source, target)
    # safetensors knows the dtype, and numpy has only its bits.
    bits, name = {
        "bfloat16": (lambda t: (t.view(np.uint32) >> 16).astype(np.uint16), b"BF16"),
        "float8_e5m2": (lambda t: (t.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8), b"F8_E5M2"),
        "float8_e4m3fn": (_e4m3, b"F8_E4M3"),
    }[dtype]
    save_file({n: bits(t) for n, t in load_file(target / WEIGHTS).items()}, target / WEIGHTS, {"format": "pt"})
    content = (target / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = re.sub(rb'"dtype":"U(8|16)"', b'"dtype":"' + name + b'"', content[8 : 8 + length])
    header += b" " * (-len(header) % 8)
    (target / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    return target
