"""What `check` knows of one adapter: the files, the base, what each engine has for it, how it will be served.

In: an `Adapter`, a `Base` and `EngineView`s where they are known. Out: a `Subject`, which the rules ask: which module a
pair of the file leads to in an engine, and which modules the config targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.pattern_index import ends
from lora_probe.base import Base, EngineView, ModuleView, Shapes
from lora_probe.names import PREFIX, Key
from lora_probe.rules.vllm_versions import Behaviour


@dataclass(frozen=True)
class Serving:
    """How vLLM will be started: its flags by their names, None where they are not given."""

    vllm: Behaviour
    max_lora_rank: int | None = None
    dtype: str | None = None
    lora_dtype: str | None = None
    lora_target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Place:
    """Where a pair leads in an engine: the name that the engine makes of its own, and the module of that name.

    `name` is None where the engine drops such names (`dropped` says how), or takes no such name at all.
    """

    name: str | None
    module: ModuleView | None
    dropped: str = ""


@dataclass(frozen=True)
class Subject:
    """One adapter, and all that is known of where it will run. `unasked` holds why an engine did not say itself what it
    has for the base."""

    adapter: Adapter
    serving: Serving
    base: Base | None = None
    views: Mapping[str, EngineView] = field(default_factory=dict)
    unasked: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> Shapes | None:
        """The modules of the base by the names of Transformers, as far as PEFT can adapt them; None for no base."""
        if (view := self.views.get("peft")) is not None:
            return {name: module.shape for name, module in view.modules.items() if not module.why_not}
        return self.base.shapes or None if self.base is not None else None

    @cached_property
    def places(self) -> Mapping[str, Mapping[Key, Place]]:
        """For each engine and pair: where it leads."""
        found = {}
        for engine, view in self.views.items():
            texts = _text_homes(view) if self.serving.vllm.text_names_on_multimodal else {}
            found[engine] = {pair.key: _place(view, pair, texts) for pair in self.adapter.modules}
        return found

    @cached_property
    def targeted(self) -> frozenset[str]:
        """The modules of the base that the config targets."""
        return frozenset(self.adapter.config.targeted(self.shapes or ()))

    @cached_property
    def homes(self) -> Mapping[str, Mapping[str, str]]:
        """For each engine: its name of each module of the base that it has -> the base's name."""
        return {engine: engine_names(view, self.shapes or {}) for engine, view in self.views.items()}

    def aliases(self, engine: str) -> dict[str, str]:
        """Module names in the file that the engine takes for a module of another name in the base."""
        shapes, homes = self.shapes or {}, self.homes[engine]
        found = {}
        for pair in self.adapter.modules:
            place = self.places[engine][pair.key]
            if place.module is not None and place.name is not None and pair.module not in shapes:
                home = homes.get(place.name)
                if home is not None and home != pair.module:
                    found[pair.module] = home
        return found


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
    found: dict[str, str] = {}
    for name, mapped in renamed.items():
        if mapped in view.modules:
            found[mapped] = name
        elif len(candidates[mapped]) == 1:
            found.setdefault(candidates[mapped][0], name)
    return found


def _place(view: EngineView, pair: AdapterModule, texts: Mapping[str, str]) -> Place:
    """Mirrors vLLM's `parse_fine_tuned_lora_name`, and the prefix that PEFT's `set_peft_model_state_dict` expects.

    `texts` are the `_text_homes` of a vLLM that tries them."""
    tensor = pair.a or pair.b
    assert tensor is not None, "a pair has at least one half"
    stored = tensor.name
    if view.engine == "peft":
        if not stored.startswith(PREFIX) and not view.renames:
            return Place(None, None, f"its name does not begin with `{PREFIX}`")
        return _at(view, pair, view.renamed(stored.removeprefix(PREFIX)))
    if view.skips(stored):
        return Place(None, None, f"{view.model} skips names with {', '.join(view.skip_prefixes)}")
    # vLLM takes every occurrence of the prefix out of a name that begins with it.
    bare = stored.replace(PREFIX, "") if stored.startswith(PREFIX) else stored
    place = _at(view, pair, view.renamed(bare))
    if place.module is None and place.name is not None:
        tried = [f"{texts[end]}.{end}" for end in (place.name, place.name.removeprefix("model.")) if end in texts]
        if tried:
            name = min(tried, key=lambda module: module.partition(".")[0])
            return Place(name, view.modules[name])
    return place


def _text_homes(view: EngineView) -> dict[str, str]:
    """What stands behind the first dot of a module's name -> the first of the parts of the model that hold it, in the
    order of their names. vLLM 0.33 looks there for a text model's name (`_get_text_lora_names`)."""
    homes = {module.partition(".")[0] for module, found in view.modules.items() if not found.why_not} - {"model"}
    texts: dict[str, str] = {}
    for module in view.modules:
        home, dot, end = module.partition(".")
        if dot and home in homes:
            texts[end] = min(home, texts.get(end, home))
    return texts


def _at(view: EngineView, pair: AdapterModule, renamed: str | None) -> Place:
    if renamed is None:
        return Place(None, None, f"{view.model} drops such names")
    name = renamed
    for half in (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B"):
        if half in name:
            name = name[: name.rindex(half)]
            break
    if view.engine == "peft" and pair.parameter != "weight":
        # PEFT stores a fused parameter under its module: `experts.base_layer` for the inner one, `experts`.
        name = name.removesuffix(".base_layer")
        if pair.parameter not in view.parameters.get(name, ()):
            return Place(name, None)
    return Place(name, view.modules.get(name))
