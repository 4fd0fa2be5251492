"""What `check` knows of one adapter: the files, the base, what each engine has for it, how it will be served.

In: an `Adapter`, a `Base` and `EngineView`s where they are known, and what `prediction` made of them. Out: a `Subject`,
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
    """One adapter, and all that is known of where it will run; `prediction.subject_of` makes it.

    `views` holds what each engine has for the base, `unasked` why an engine could not be asked. `shapes` are the
    modules of the base by the names of Transformers, as far as PEFT can adapt them; None where the base is not known.
    `places` says for each engine in `views` and each pair where it leads.
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
