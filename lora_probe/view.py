"""What an engine has for a base: `EngineView`, which modules under which names, of which shapes, which it adapts.

In: an engine's own account (`Engine.describe`), or, where the engine is not installed, the headers of the base's
files. Out: for a tensor's name in an adapter file, the name that the engine makes of it, and the module behind that.
No weights and no running engine are needed.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

Kind = Literal["linear", "embedding", "head", "experts", "other"]


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

    kind: Kind
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
    `{"model.layers.0.mlp.experts": ["gate_up_proj", "down_proj"]}`). `source` is "engine", or "headers" where the
    engine was not there to be asked.
    """

    engine: str
    version: str
    model: str
    modules: dict[str, ModuleView]
    source: Literal["engine", "headers"] = "engine"
    renames: tuple[Rename, ...] = ()
    suffixes: tuple[str, ...] = ()
    skip_prefixes: tuple[str, ...] = ()
    vocabulary: int | None = None
    experts: Literal["", "2d", "3d"] = ""
    parameters: dict[str, list[str]] = {}
    notes: tuple[str, ...] = ()

    def renamed(self, name: str) -> str | None:
        """The engine's name for a tensor's, both without PEFT's prefix; None where the engine drops it."""
        for step in self.renames:
            found = _apply(step, name)
            if found is None:
                return None
            name = found
        return name


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
