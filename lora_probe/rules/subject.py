"""What `check` knows about one adapter: the files, the base, each engine's modules, how it will be served.

In: an `Adapter`, a `Base` and `EngineView`s if they are known, and what `prediction` made of them. Out: a `Subject`,
which the rules ask: which module a pair of the file leads to in an engine, and which modules the config targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lora_probe.adapter import Adapter
from lora_probe.base import Base, EngineView, ModuleView, Shapes
from lora_probe.names import Key
from lora_probe.rules.vllm_versions import Behaviour


@dataclass(frozen=True)
class Serving:
    """How vLLM will be started: its flags by their names, None if they are not passed."""

    vllm: Behaviour
    max_lora_rank: int | None = None
    dtype: str | None = None
    lora_dtype: str | None = None
    lora_target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Place:
    """Where a pair leads in an engine: the engine's name for it, and the module of that name.

    `name` is None if the engine drops such names (`dropped` states how) or does not accept such a name at all.
    """

    name: str | None
    module: ModuleView | None
    dropped: str = ""


@dataclass(frozen=True)
class Subject:
    """One adapter, and all that is known about where it will run; `prediction.subject_of` makes it.

    `views` holds each engine's modules for the base, `unasked` why an engine could not be asked. `shapes` are the
    modules of the base by the names of Transformers, as far as PEFT can adapt them; None if the base is unknown.
    `places` maps each engine in `views` and each pair to where it leads.
    """

    adapter: Adapter
    serving: Serving
    base: Base | None = None
    views: Mapping[str, EngineView] = field(default_factory=dict)
    unasked: Mapping[str, str] = field(default_factory=dict)
    shapes: Shapes | None = None
    places: Mapping[str, Mapping[Key, Place]] = field(default_factory=dict)

    @cached_property
    def targeted(self) -> frozenset[str]:
        """The modules of the base that the config targets."""
        return frozenset(self.adapter.config.targeted(self.shapes or ()))
