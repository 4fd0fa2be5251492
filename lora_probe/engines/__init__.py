"""Engines: what can run an adapter and record it.

In: a `RunSpec`, or a base. Out: a process's folder of a trace, or what the engine has for that base. Engines are found
by the entry-point group `lora_probe.engines`; the core brings `peft`, the distribution lora-probe-vllm brings `vllm`.
What an engine needs, and what installs it, is in its predictor (group `lora_probe.predictors`): an engine that is not
installed is known by that. An engine without a predictor can have both itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from lora_probe.base.engine_view import EngineView
from lora_probe.base.model import Base
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.files.extensions import ENGINES, PREDICTORS, broken, in_order, load, points
from lora_probe.recording.records import RunSpec


class Engine(Protocol):
    """Something that runs an adapter. It is made without arguments, in a process of its own.

    Its class may have `needs`, the names of modules without which it cannot run, `install`, the command that installs
    it, and `has_flags`, False for an engine without flags. Importing the class must be cheap: what is heavy is imported
    when it is made.
    """

    def describe(self, base: Base, task: str | None) -> EngineView:
        """Which modules the engine has for `base`, under which names, and which of them it adapts.

        No weights are read and no engine is started: `config.json` is enough. `task` is PEFT's `task_type`
        (`CAUSAL_LM`, `SEQ_CLS`, ...), None where the adapter names none.

        Raises:
            EngineFailed: the engine cannot build this model; its own words. A class that takes no adapter is an answer.
        """
        ...

    def record(self, spec: RunSpec, folder: Path) -> None:
        """Run `spec` and write the trace into `folder`.

        Raises:
            ProbeError: the engine did not start, or the probe was not in it. A refusal of the adapter is no error:
                it is recorded.
        """
        ...


def names() -> list[str]:
    """All engines that a user may name: the installed ones, and those that only have a predictor."""
    return in_order([*points(ENGINES), *points(PREDICTORS)])


def require(name: str, flags: Sequence[str] = ()) -> EntryPoint:
    """The entry point of the engine called `name`, without importing anything heavy. `flags` are for the engine itself.

    Raises:
        ProbeError: nobody knows that name, or the engine has no flags.
        EngineFailed: its distribution, or a library that it needs, is not installed.
    """
    engine, predictor = points(ENGINES).get(name), points(PREDICTORS).get(name)
    known = predictor or engine
    if known is None:
        raise ProbeError(f"there is no engine `{name}`", f"engines: {', '.join(names())}")
    facts = load(known)
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
    """The engine called `name`; imports what it needs. Raises as `require` does."""
    point = require(name)
    kind = load(point)
    if not callable(getattr(kind, "record", None)):
        raise broken(point, "it has no method `record`")
    engine: Engine = kind()
    return engine
