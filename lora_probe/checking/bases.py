"""The adapters' base models, and each engine's view of them. Every base model is opened and described only once.

In: an adapter, and the base model that the user passed, if any. Out: the base model and the engines' views of it, with
notes about what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_probe.adapter import Adapter, TrainedAs
from lora_probe.base import Base, EngineView, open_base
from lora_probe.engines.describing import views_of
from lora_probe.errors import ModelNotFound, ProbeError
from lora_probe.files import shown
from lora_probe.prediction import peft, predictors
from lora_probe.rules.subject import Origin


@dataclass(frozen=True)
class BaseOf:
    """The base model of an adapter, its name, how it was found, and notes for the report."""

    base: Base | None
    name: str | None
    origin: Origin
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaseViews:
    """The engines' views of a base model; in `missing`, why an engine has none; and notes for the report."""

    views: Mapping[str, EngineView] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


PASS = "pass the base model with --model"
"""The note on an adapter whose base model is not there; why it is not is in the headline."""


class Bases:
    """The base models that were opened so far, and the engines' views of them."""

    def __init__(self, model: str | None, progress: Callable[[str], None], engines: Sequence[str] = ()) -> None:
        self.model = model
        self.progress = progress
        # PEFT's names are those of the base, so it is always asked.
        self._engines = tuple(name for name in predictors() if not engines or name in engines or name == peft.NAME)
        self._bases: dict[str, Base | ProbeError] = {}
        self._views: dict[tuple[Path, TrainedAs], BaseViews] = {}
        if model is not None:
            # A base model that the user passed must exist.
            self._bases[model] = open_base(model)

    def base(self, adapter: Adapter) -> BaseOf:
        """The base model of an adapter: the one that was passed, or the one that its config names."""
        named = adapter.config.base_model
        if self.model is not None:
            other = self._open(named) if named and named != self.model else None
            passed = self._open(self.model)
            assert isinstance(passed, Base)
            return BaseOf(passed, self.model, Origin(self.model, other if isinstance(other, Base) else None))
        if named is None:
            why = "adapter_config.json does not name a base model"
            return BaseOf(None, None, Origin(why_not=why), (PASS,))
        base = self._open(named)
        if isinstance(base, Base):
            return BaseOf(base, named, Origin())
        short = "was not found" if isinstance(base, ModelNotFound) else "cannot be read"
        notes = (PASS,) if isinstance(base, ModelNotFound) else (PASS, base.message)
        return BaseOf(None, named, Origin(why_not=f"base model `{shown(named)}` {short}"), notes)

    def _open(self, name: str) -> Base | ProbeError:
        if name not in self._bases:
            try:
                self._bases[name] = open_base(name)
            except ProbeError as error:
                self._bases[name] = error
        return self._bases[name]

    def views(self, base: Base, trained: TrainedAs) -> BaseViews:
        """Each engine's view of the base model; made from the headers of its files if an engine has none."""
        key = base.path, trained
        if key not in self._views:
            answers = views_of(base, self._engines, trained, self.progress)
            views, notes = dict(answers.found), []
            for engine, reason in answers.missing.items():
                why = _short(reason)
                if (view := predictors()[engine].view_of_headers(base, engine, why)) is not None:
                    views[engine] = view
                else:
                    notes.append(f"{engine} did not describe the base ({why}), and the base has no safetensors files")
            notes += [note for view in views.values() for note in view.notes]
            self._views[key] = BaseViews(views, answers.missing, tuple(notes))
        return self._views[key]


def _short(why: str) -> str:
    """The cause in a few words: an engine's own message may be long."""
    if match := _MODULE.search(why):
        return f"it needs the module `{match[1]}` for this base, which is not installed"
    return why if len(why) <= 200 else f"{why[:197]}..."


_MODULE = re.compile(r"No module named '([\w.]+)'")
