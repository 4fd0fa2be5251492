"""The bases that adapters name, and what each engine has for them: every base is opened once, every engine asked once.

In: an adapter, and the base that was given, if one was. Out: the base, and for it the engines' views, with what to tell
of those that could not be had.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_probe.adapter import Adapter
from lora_probe.base import Base, EngineView, open_base
from lora_probe.engines.describing import views_of
from lora_probe.errors import ModelNotFound, ProbeError
from lora_probe.prediction import predictors


@dataclass(frozen=True)
class Asked:
    """What the engines have for a base, why one did not say, and what to tell of that."""

    views: Mapping[str, EngineView] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Bases:
    """The bases that were met, and what the engines have for them: each is asked once."""

    def __init__(self, model: str | None, progress: Callable[[str], None]) -> None:
        self.model = model
        self.progress = progress
        self._bases: dict[str, Base | ProbeError] = {}
        self._views: dict[tuple[Path, str | None], Asked] = {}
        if model is not None:
            # A base that was asked for by name must be there.
            self._bases[model] = open_base(model)

    def base(self, adapter: Adapter) -> tuple[Base | None, str | None, tuple[str, ...]]:
        """The base, its name, and what to say about either."""
        name = self.model or adapter.config.base_model
        if name is None:
            return None, None, ("adapter_config.json names no base model; pass --model",)
        if name not in self._bases:
            try:
                self._bases[name] = open_base(name)
            except ProbeError as error:
                self._bases[name] = error
        found = self._bases[name]
        if isinstance(found, ProbeError):
            why = "was not found" if isinstance(found, ModelNotFound) else f"cannot be read ({found.message})"
            return None, name, (f"base model `{name}` (from adapter_config.json) {why}; pass --model",)
        return found, name, ()

    def views(self, base: Base, task: str | None) -> Asked:
        """What each engine has for the base; of the files' headers where an engine is not there to be asked."""
        asked = base.path, task
        if asked not in self._views:
            answers = views_of(base, tuple(predictors()), task, self.progress)
            views, notes = dict(answers.found), []
            for engine, reason in answers.missing.items():
                why = _short(reason)
                if (view := predictors()[engine].view_of_headers(base, engine, why)) is not None:
                    views[engine] = view
                else:
                    notes.append(f"{engine} did not describe the base ({why}), and the base has no safetensors files")
            notes += [note for view in views.values() for note in view.notes]
            self._views[asked] = Asked(views, answers.missing, tuple(notes))
        return self._views[asked]


def _short(why: str) -> str:
    """The cause first: an engine's own words may be long."""
    if match := _MODULE.search(why):
        return f"it needs the module `{match[1]}` for this base, which is not installed"
    return why if len(why) <= 200 else f"{why[:197]}..."


_MODULE = re.compile(r"No module named '([\w.]+)'")
