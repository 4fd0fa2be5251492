"""Names of modules: keys, prefixes, layers, and short texts for many paths.

In: paths of modules as Transformers names them. Out: their layer, their projection, a sort key, or a short text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Key = tuple[str, str, int | None]
"""(module path in the base model, parameter, expert or None): the name of a module in all of lora-probe."""

PREFIX = "base_model.model."

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""Projections in the order of a layer."""

LAYER = re.compile(r"(?:^|\.)([0-9]{1,9})\.")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key for paths in the order of computing: layer 2 before layer 10, attention before mlp, q before k."""
    return [_place(part) for part in name.split(".")]


_EARLY = ("embed_tokens", "self_attn", "self_attention", "attention", "attn", *PROJECTIONS)


def _place(part: str) -> tuple[int, int, str]:
    # Not `isdigit`: `int` does not accept all digits of other alphabets, nor thousands of digits.
    if part.isdecimal() and len(part) < 20:
        return 1, int(part), ""
    return 0, _EARLY.index(part) if part in _EARLY else len(_EARLY) + (part == "lm_head"), part


def layer_of(module: str) -> int | None:
    """The layer number in a module's path: its first number."""
    match = LAYER.search(module)
    return int(match[1]) if match else None


def projection_of(module: str) -> str:
    """The last word of a module's path: `q_proj`."""
    return module.rpartition(".")[2]


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def name_modules(modules: Iterable[str]) -> str:
    """Module paths as a short text: `layer 5 q_proj, k_proj, v_proj`, `layers 0-29 q_proj`. If several parts of a
    model have layers, their names are added: `vision_tower.layers 0-11 q_proj`."""
    towers: dict[str, dict[int, list[str]]] = {}
    loose: list[str] = []
    for module in modules:
        match = LAYER.search(module)
        if match is None:
            loose.append(module)
        else:
            numbered = towers.setdefault(module[: match.start(1)].rpartition(".")[0], {})
            numbered.setdefault(int(match[1]), []).append(projection_of(module))
    parts = []
    for tower, layers in towers.items():
        by_projections: dict[tuple[str, ...], list[int]] = {}
        for layer, projections in layers.items():
            by_projections.setdefault(tuple(projections), []).append(layer)
        for names, numbers in by_projections.items():
            where = "layer" if len(numbers) == 1 else "layers"
            if len(towers) > 1:
                where = tower if tower.rpartition(".")[2] in ("layers", "layer", "h", "blocks") else f"{tower} {where}"
            parts.append(f"{where} {ranges(numbers)} {', '.join(names)}")
    return "; ".join(parts + loose)


def in_words(names: Sequence[str]) -> str:
    """Names in a sentence: `peft, vllm and another`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
