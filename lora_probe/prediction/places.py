"""Where the pairs of a file lead in an engine, and what the engine calls the modules of the base.

In: what an engine has for the base, names of tensors and of modules. Out: a `Place` for a name, and the names of both
sides matched. What only one engine does with names is in that engine's file.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.pattern_index import ends
from lora_probe.base import EngineView, Shapes
from lora_probe.names import PREFIX, Key
from lora_probe.rules.paths import wrapper_words
from lora_probe.rules.subject import Place, Serving

_HALVES = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B")


def name_in_file(pair: AdapterModule) -> str:
    """The name of the first half of a pair that is there."""
    half = pair.a or pair.b
    assert half is not None, "a pair has at least one half"
    return half.name


def wrappers_of(pair: AdapterModule) -> tuple[str, ...]:
    """The words in a pair's name that come from wrappers. `base_layer` belongs to the name of a fused parameter."""
    words = wrapper_words(name_in_file(pair))
    return tuple(word for word in words if word != "base_layer" or pair.parameter == "weight")


def place_of(view: EngineView, renamed: str | None) -> Place:
    """Where a tensor leads that the engine calls `renamed`; None stands for a name that it drops."""
    if renamed is None:
        return Place(None, None, f"{view.model} drops such names")
    name = renamed
    for half in _HALVES:
        if half in name:
            name = name[: name.rindex(half)]
            break
    return Place(name, view.modules.get(name))


def resolve(view: EngineView, adapter: Adapter, serving: Serving) -> dict[Key, Place]:
    """Where each pair leads in an engine that removes PEFT's prefix and otherwise renames only as `view` states."""
    return {pair.key: place_of(view, view.renamed(name_in_file(pair).removeprefix(PREFIX))) for pair in adapter.modules}


def engine_names(view: EngineView, shapes: Shapes) -> dict[str, str]:
    """The engine's name of each module of the base that it has -> the base's name.

    A module's files may lack a prefix that the engine's class adds (`h.0.attn` for `transformer.h.0.attn`): an end that
    only one module has is as good as the name.
    """
    renamed = {name: mapped for name in shapes if (mapped := view.renamed(name)) is not None}
    candidates: dict[str, list[str]] = {mapped: [] for mapped in renamed.values()}
    for module in view.modules:
        for end in ends(module):
            if end != module and end in candidates:
                candidates[end].append(module)
    names: dict[str, str] = {}
    for name, mapped in renamed.items():
        if mapped in view.modules:
            names[mapped] = name
        elif len(candidates[mapped]) == 1:
            names.setdefault(candidates[mapped][0], name)
    return names


def aliases(
    adapter: Adapter, shapes: Shapes, places: Mapping[Key, Place], base_names: Mapping[str, str]
) -> dict[str, str]:
    """Module names in the file that the engine maps to a module of another name in the base. `base_names` are the
    `engine_names`."""
    others: dict[str, str] = {}
    for pair in adapter.modules:
        place = places[pair.key]
        if place.module is not None and place.name is not None and pair.module not in shapes:
            name = base_names.get(place.name)
            if name is not None:
                others[pair.module] = name
    return others
