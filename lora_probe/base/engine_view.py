"""What an engine has for a base: `EngineView`, which modules under which names, of which shapes, which it adapts.

In: an engine's own account (`Engine.describe`), or, where the engine is not installed, the headers of the base's
files. Out: for a tensor's name in an adapter file, the name that the engine makes of it, and the module behind that.
No weights and no running engine are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from lora_probe.base.checkpoint import EMBEDDINGS
from lora_probe.base.model import Base
from lora_probe.names import PREFIX

SCHEMA = 4
"""Raised when a view is built or written in another way, so that none of before is taken for one of today."""

LM_HEADS = ("lm_head", "embed_out")
"""What transformers' models call the output head over the vocabulary."""

CLASSIFIER_HEADS = ("score", "classifier")
"""What transformers' models call the head of a classifier; vLLM reads a trained one of these names only."""

Shapes = Mapping[str, tuple[int, int] | None]
"""Module path in the base: (out, in) of its weight, None where it is not known."""

TRANSPOSED = ("gpt2", "openai-gpt")
"""Kinds of models whose projections are transformers' `Conv1D`: (in, out) in the file."""

EXPERT = re.compile(r"\.experts\.\d+\.")
"""What stands in the name of a projection of a single expert."""

ModuleKind = Literal["linear", "embedding", "head", "experts", "other"]


class Rename(msgspec.Struct, frozen=True):
    """One step of an engine's mapping of names, applied in order to the whole name of a tensor without PEFT's prefix.

    `regex`: `re.sub(old, new, name)`. `substr`, `prefix`, `suffix`: the first (for `suffix` the last) occurrence of
    `old` becomes `new`. `new` is None where the engine drops such names.
    """

    kind: Literal["regex", "substr", "prefix", "suffix"]
    old: str
    new: str | None


class ModuleView(msgspec.Struct, frozen=True):
    """One module, or one projection of a layer that fuses several (`packed`).

    `shape` is (out, in) of its weight as Transformers counts it, (vocabulary, hidden) for embeddings and heads, None
    where nobody knows. `engine_as` is what the engine calls it (`model.layers.0.self_attn.qkv_proj[1]`). `why_not` says
    why the engine makes no LoRA layer of it; it is empty where it does.
    """

    kind: ModuleKind
    shape: tuple[int, int] | None
    engine_as: str
    packed: bool = False
    why_not: str = ""


class EngineView(msgspec.Struct, frozen=True):
    """What an engine has for one base.

    `modules` maps the names that an adapter's tensors may lead to (after `renames`, fused layers taken apart) to what
    stands there; modules that cannot be adapted are in it too, with why. `suffixes` are the last words of a name that
    the loader takes (vLLM's check of unexpected modules), empty for an engine without such a check. `skip_prefixes`
    are names that the model's class skips in silence. `experts` is how fused experts are adapted: "2d" each expert by
    itself, "3d" as the two fused parameters. `parameters` maps a module to its fused parameters (PEFT:
    `{"model.layers.0.mlp.experts": ["gate_up_proj", "down_proj"]}`). `refuses` holds the engine's words where it takes
    no adapter for this class at all; no module is adapted then. `default_targets` are
    PEFT's own for a config that names none. `takes_back`: a name stays as it is where `renames`
    would only shorten it at its beginning, PEFT's prefix included (PEFT). `source` is "engine", or "headers" where the
    engine was not there to be asked.
    """

    engine: str
    version: str
    model: str
    modules: dict[str, ModuleView]
    source: Literal["engine", "headers"] = "engine"
    renames: tuple[Rename, ...] = ()
    takes_back: bool = False
    suffixes: tuple[str, ...] = ()
    skip_prefixes: tuple[str, ...] = ()
    vocabulary: int | None = None
    experts: Literal["", "2d", "3d"] = ""
    parameters: dict[str, list[str]] = {}
    refuses: str = ""
    default_targets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def skips(self, name: str) -> bool:
        """Whether the model's class skips tensors of that name (vLLM's `LoRAModel._should_skip_module`)."""
        return any(name.startswith(skip) or f".{skip}" in name for skip in self.skip_prefixes)

    def renamed(self, name: str) -> str | None:
        """The engine's name for a tensor's, both without PEFT's prefix; None where the engine drops it."""
        found = name
        for step in self.renames:
            after = _apply(step, found)
            if after is None:
                return None
            found = after
        return name if self.takes_back and f"{PREFIX}{name}".endswith(found) else found


def _apply(step: Rename, name: str) -> str | None:
    if step.kind == "regex":
        if not re.search(step.old, name):
            return name
        return None if step.new is None else re.sub(step.old, step.new, name)
    present = {
        "substr": step.old in name,
        "prefix": name.startswith(step.old),
        "suffix": name.endswith(step.old),
    }[step.kind]
    if not present:
        return name
    if step.new is None:
        return None
    return step.new.join(name.rsplit(step.old, 1)) if step.kind == "suffix" else name.replace(step.old, step.new, 1)


def of_headers(base: Base, engine: str, why: str) -> EngineView | None:
    """What is known of `base` where `engine` cannot be asked: the matrices in the headers of its files.

    None for a base without safetensors files. Names are the files', which are the engine's for most text models. `why`
    is the reason for not asking.
    """
    if not base.shapes:
        return None
    modules = {name: _of_header(name, shape, base) for name, shape in base.shapes.items()}
    embedding = next((view.shape for view in modules.values() if view.kind == "embedding"), None)
    if embedding is not None and not any(view.kind == "head" for view in modules.values()) and _is_causal(base):
        # A tied head is not in the files.
        modules["lm_head"] = ModuleView("head", embedding, "lm_head")
    note = f"{engine} was not asked what it has ({why}): names and shapes are from the headers of the base's files"
    return EngineView(
        engine=engine,
        version="",
        model=base.architecture,
        modules=modules,
        source="headers",
        vocabulary=embedding[0] if embedding else None,
        notes=(note,),
    )


def _of_header(name: str, shape: tuple[int, int] | None, base: Base) -> ModuleView:
    last = name.rpartition(".")[2]
    if last in EMBEDDINGS:
        return ModuleView("embedding", shape, name)
    if last in LM_HEADS:
        return ModuleView("head", shape, name)
    if EXPERT.search(name):
        return ModuleView("experts", shape, name)
    if shape is not None and base.config.get("model_type") in TRANSPOSED and last.startswith("c_"):
        shape = shape[::-1]
    return ModuleView("linear", shape, name)


def _is_causal(base: Base) -> bool:
    return base.architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
