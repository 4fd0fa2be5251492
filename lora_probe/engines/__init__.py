"""Engines: what can run an adapter and record it.

In: a `RunSpec`, or a base. Out: a process's folder of a trace, or what the engine has for that base. Engines are found
by the entry-point group `lora_probe.engines`; the core brings `peft`, the distribution lora-probe-vllm brings `vllm`.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from lora_probe.base.engine_view import EngineView
from lora_probe.base.model import Base
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.recording.records import RunSpec

GROUP = "lora_probe.engines"
KNOWN = {
    "peft": "pip install 'lora-probe[peft]'",
    "vllm": "pip install lora-probe-vllm (in this repository: pip install ./plugins/vllm) beside your vLLM",
}
"""Engines that stay in the help when they are not installed, and what installs them."""
NEEDED = {"peft": ("torch", "transformers", "peft"), "vllm": ("vllm",)}
"""The modules without which they cannot run."""


class Engine(Protocol):
    """Something that runs an adapter. It is made without arguments, in a process of its own."""

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
    """All engines that a user may name: the installed ones and the known ones."""
    return sorted({*KNOWN, *(point.name for point in entry_points(group=GROUP))})


def require(name: str) -> EntryPoint:
    """The entry point of the engine called `name`, without importing anything heavy.

    Raises:
        ProbeError: nobody knows that name.
        EngineFailed: its distribution, or a library that it needs, is not installed.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        if name not in KNOWN:
            raise ProbeError(f"there is no engine `{name}`", f"engines: {', '.join(names())}")
        raise EngineFailed(f"the engine `{name}` is not installed", KNOWN[name])
    for module in NEEDED.get(name, ()):
        if find_spec(module) is None:
            raise EngineFailed(f"the engine `{name}` needs the module `{module}`", KNOWN[name])
    return points[0]


def make(name: str) -> Engine:
    """The engine called `name`; imports what it needs. Raises as `require` does."""
    engine: Engine = require(name).load()()
    return engine
