"""What an engine has for a base model: `EngineView`, with each module's name and shape, and whether it can be adapted.

In: the engine's own description (`Engine.describe`), or, if the engine is not installed, the headers of the base's
files. Out: for a tensor name in an adapter file, the engine's name for it, and the module behind that name. Neither
weights nor a running engine are needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from lora_probe.base.checkpoint import EMBEDDINGS
from lora_probe.base.model import Base
from lora_probe.names import PREFIX

SCHEMA = 6
"""Incremented when views are built or written in another way, so that older ones are not reused."""

LM_HEADS = ("lm_head", "embed_out")
"""transformers' names for the output head over the vocabulary."""

CLASSIFIER_HEADS = ("score", "classifier")
"""What transformers' models call the head of a classifier; vLLM reads a trained one of these names only."""

Shapes = Mapping[str, tuple[int, int] | None]
"""Module path in the base -> (out, in) of its weight, None if unknown."""

TRANSPOSED = ("gpt2", "openai-gpt")
"""Model types whose projections are transformers' `Conv1D`: (in, out) in the file."""

EXPERT = re.compile(r"\.experts\.\d+\.")
"""What stands in the name of a projection of a single expert."""

ModuleKind = Literal["linear", "embedding", "head", "experts", "other"]


class Rename(msgspec.Struct, frozen=True):
    """One step of an engine's name mapping. Steps apply in order to the whole tensor name without PEFT's prefix.

    `regex`: `re.sub(old, new, name)`. `substr`, `prefix`, `suffix`: the first (for `suffix` the last) occurrence of
    `old` becomes `new`. `new` is None if the engine drops such names.
    """

    kind: Literal["regex", "substr", "prefix", "suffix"]
    old: str
    new: str | None


class ModuleView(msgspec.Struct, frozen=True):
    """One module, or one projection of a layer that fuses several (`packed`).

    `shape` is (out, in) of its weight in Transformers' convention, (vocabulary, hidden) for embeddings and heads, None
    if unknown. `engine_as` is its name in the engine (`model.layers.0.self_attn.qkv_proj[1]`). `why_not` is the reason
    why the engine makes no LoRA layer of it, empty if it does.
    """

    kind: ModuleKind
    shape: tuple[int, int] | None
    engine_as: str
    packed: bool = False
    why_not: str = ""


class EngineView(msgspec.Struct, frozen=True):
    """What an engine has for one base model.

    `modules` maps the names that an adapter's tensors may have (after `renames`, with fused layers split) to modules,
    including those that cannot be adapted, with the reason. `suffixes` are the last parts of names that the loader
    accepts (vLLM's check for unexpected modules), empty for an engine without such a check. `skip_prefixes` are names
    that the model class skips silently. `experts` is how fused experts are adapted: "2d" each expert by itself, "3d" as
    the two fused parameters. `parameters` maps a module to its fused parameters (PEFT: `{"model.layers.0.mlp.experts":
    ["gate_up_proj", "down_proj"]}`), and `expert_shapes` the path of each to (out, in) of an expert, where PEFT 0.19
    turned that round. `refuses` is the engine's message if it accepts no adapter for this model class; then no module
    is adapted. `default_targets` are PEFT's targets for a config without any. `takes_back`: a name stays unchanged if
    `renames` would only shorten it at the beginning, PEFT's prefix included (PEFT). `source` is "engine", or "headers"
    if the engine could not describe the base.
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
    expert_shapes: dict[str, tuple[int, int]] = {}
    refuses: str = ""
    default_targets: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def skips(self, name: str) -> bool:
        """Whether the model class skips tensors with this name (vLLM's `LoRAModel._should_skip_module`)."""
        return any(name.startswith(skip) or f".{skip}" in name for skip in self.skip_prefixes)

    def renamed(self, name: str) -> str | None:
        """The engine's name for a tensor name, both without PEFT's prefix; None if the engine drops it."""
        result = name
        for step in self.renames:
            after = _apply(step, result)
            if after is None:
                return None
            result = after
        return name if self.takes_back and f"{PREFIX}{name}".endswith(result) else result


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
    """The view of `base` if `engine` cannot describe it: the matrices in the headers of its files.

    None for a base without safetensors files. The names are the files', which for most text models are the engine's.
    `why` is the reason why the engine did not describe the base.
    """
    if not base.shapes:
        return None
    modules = {name: _of_header(name, shape, base) for name, shape in base.shapes.items()}
    embedding = next((view.shape for view in modules.values() if view.kind == "embedding"), None)
    if embedding is not None and not any(view.kind == "head" for view in modules.values()) and _is_causal(base):
        # The files do not contain a tied head.
        modules["lm_head"] = ModuleView("head", embedding, "lm_head")
    note = f"{engine} did not describe the base ({why}); names and shapes are from the headers of its files"
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
