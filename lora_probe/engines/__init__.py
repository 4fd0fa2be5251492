"""Engines: they run an adapter and record it.

In: a `RunSpec`, or a base model. Out: the folder of a process in a trace, or the engine's view of the base model.
Engines are found by the entry-point group `lora_probe.engines`: lora-probe itself has `peft`, the distribution
lora-probe-vllm has `vllm`. An engine's predictor (group `lora_probe.predictors`) contains what the engine needs and the
command that installs it, so that engines that are not installed are known too. An engine without a predictor can have
both itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from lora_probe.adapter.config import TrainedAs
from lora_probe.base.engine_view import EngineView
from lora_probe.base.model import Base
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.files.extensions import ENGINES, PREDICTORS, broken, in_order, load, points
from lora_probe.recording.records import RunSpec


class Engine(Protocol):
    """An engine that runs adapters. It is created without arguments, in a separate process.

    Its class may have `needs`, the names of modules without which it cannot run, `install`, the command that installs
    it, and `has_flags`, False for an engine without flags. Importing the class must be cheap: heavy libraries are
    imported when it is created. It may have `mixture`, which `compare --bisect` needs: `lora_probe.engines.mixtures`.
    """

    def describe(self, base: Base, trained: TrainedAs) -> EngineView:
        """Which modules the engine has for `base`, under which names, and which of them it adapts.

        No weights are read and no engine is started: `config.json` is enough. `trained` is how the adapter's trainer
        loaded the base, which decides the class of the model.

        Raises:
            EngineFailed: the engine cannot build this model; with its own message. A class that the engine does not
                serve, or not with adapters, is not an error: `EngineView.refuses`.
        """
        ...

    def record(self, spec: RunSpec, folder: Path) -> None:
        """Run `spec` and write the trace into `folder`.

        Raises:
            ProbeError: the engine did not start, or the probe was not in it. A refusal of the adapter is not an error:
                it is recorded.
        """
        ...


def names() -> list[str]:
    """The names of all known engines: the installed ones, and those that only have a predictor."""
    return in_order([*points(ENGINES), *points(PREDICTORS)])


def require(name: str, flags: Sequence[str] = ()) -> EntryPoint:
    """The entry point of the engine called `name`, without importing anything heavy. `flags` are for the engine itself.

    Raises:
        ProbeError: the engine is unknown, or has no flags.
        EngineFailed: its distribution, or a library that it needs, is not installed.
    """
    engine, predictor = points(ENGINES).get(name), points(PREDICTORS).get(name)
    point = predictor or engine
    if point is None:
        raise ProbeError(f"unknown engine `{name}`", f"engines: {', '.join(names())}")
    facts = load(point)
    install = getattr(facts, "install", "")
    if engine is None:
        raise EngineFailed(f"the engine `{name}` is not installed", install)
    for module in getattr(facts, "needs", ()):
        if find_spec(module) is None:
            raise EngineFailed(f"the engine `{name}` needs the module `{module}`", install)
    if flags and not getattr(facts, "has_flags", True):
        raise ProbeError(
            f"{name} accepts no engine flags ({' '.join(flags)})", "remove the flags after `--`; they are for vLLM"
        )
    return engine


def make(name: str) -> Engine:
    """The engine called `name`; imports what it needs. Raises the same errors as `require`."""
    point = require(name)
    kind = load(point)
    if not callable(getattr(kind, "record", None)):
        raise broken(point, "it has no method `record`")
    engine: Engine = kind()
    return engine
