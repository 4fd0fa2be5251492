"""The two sides of a comparison: traces, or engines that are recorded first.

In: for each side a trace's path or an engine's name, and what the engines run. Out: two traces. An engine runs the
tokens of the other side, so that all rows can be compared even if its own answer would be another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_probe.base import open_base
from lora_probe.engines import require
from lora_probe.engines.launch import Progress, base_of, runnable, trace
from lora_probe.engines.prompts import BUILT_IN
from lora_probe.errors import ProbeError
from lora_probe.files.extensions import engine_names
from lora_probe.precision import DTYPES
from lora_probe.recording import Trace, open_trace

Reporting = Callable[[str], AbstractContextManager[Callable[[Progress], None]]]
"""Shows the progress of an engine during a block."""


@dataclass(frozen=True)
class Settings:
    """What engines run, as in `trace`; without a `checkpoint`, the adapter of the trace on the other side.
    `engine_args` are flags of vLLM."""

    checkpoint: str | None = None
    model: str | None = None
    prompts: Sequence[str] = ()
    chat: bool = False
    max_tokens: int = 32
    options: dict[str, Any] = field(default_factory=dict)
    engine_args: Sequence[str] = ()


def engines_of(reference: str, candidate: str) -> list[str]:
    """Those of two sides that are engines: their names. A trace of that name is `./NAME`."""
    engines = engine_names()
    return [side for side in (reference, candidate) if side in engines]


def open_sides(reference: str, candidate: str, settings: Settings, reporting: Reporting) -> tuple[Trace, Trace]:
    """Open the traces, and record the engines: the reference first, unless only the candidate is there already.

    Raises:
        ProbeError: as `trace` and `open_trace` do.
    """
    recorded = engines_of(reference, candidate)
    for engine in recorded:
        # Before the other one has run for minutes.
        require(engine)
    if len(recorded) == 1 and (settings.prompts or settings.chat):
        raise ProbeError(f"{recorded[0]} runs the prompts of the trace", "remove the prompts and --chat")
    for side in (reference, candidate):
        if side == "server" and not Path(side).exists():
            raise ProbeError(
                "a server cannot be recorded by `compare`",
                "run `lora-probe trace --engine server` first, and pass its trace",
            )
    first = None if reference in recorded else open_trace(reference)
    second = None if candidate in recorded else open_trace(candidate)
    if first is None:
        first = _record(reference, settings, reporting, second)
    return first, second or _record(candidate, settings, reporting, first)


def opened(reference: Trace | str | Path, candidate: Trace | str | Path, settings: Settings) -> tuple[Trace, Trace]:
    """The same from Python, where a side may be a trace that is open already, and nobody watches.

    Raises:
        ProbeError: as `open_sides` does.
    """
    if isinstance(reference, Trace) and isinstance(candidate, Trace):
        return reference, candidate
    sides = [str(side.path if isinstance(side, Trace) else side) for side in (reference, candidate)]
    return open_sides(sides[0], sides[1], settings, lambda _: nullcontext(lambda _: None))


def _record(engine: str, settings: Settings, reporting: Reporting, other: Trace | None) -> Trace:
    """`other`: the trace on the other side, if it is there. Without answers of the adapter there are none to follow."""
    answered = other is not None and any(request.adapter is not None for request in other.answers)
    follow = other.path if other is not None and answered else None
    settings = _completed(settings, other)
    dtype = settings.options.get("dtype") or (_dtype_in(other) if other is not None else "") or _dtype_of(settings)
    with reporting(engine) as progress:
        return trace(
            settings.checkpoint or ".",
            engine=engine,
            model=settings.model,
            prompts=() if follow is not None else _with_a_repetition(settings.prompts),
            chat=settings.chat and follow is None,
            max_tokens=settings.max_tokens,
            follow=follow,
            score=True,
            options=settings.options | {"dtype": dtype},
            engine_args=settings.engine_args if engine == "vllm" else (),
            progress=progress,
        )


def _with_a_repetition(prompts: Sequence[str]) -> list[str]:
    """The prompts, and the first one again: whether an engine agrees with itself is known before another is blamed."""
    wanted = list(prompts) or list(BUILT_IN)
    return [*wanted, wanted[0]]


def _completed(settings: Settings, other: Trace | None) -> Settings:
    """Without a checkpoint, the adapter of the other trace, on its base."""
    if settings.checkpoint is not None or other is None or not other.loads:
        return settings
    base = other.run.spec.model if other.run is not None else None
    return replace(settings, checkpoint=other.loads[-1][0].path, model=settings.model or base)


def _dtype_of(settings: Settings) -> str:
    """The dtype of the base model's files, float32 if its config does not state one that engines run in: `auto` is
    another dtype in each engine."""
    config = open_base(base_of(runnable(settings.checkpoint or "."), settings.model)).text
    stated = config.get("dtype") or config.get("torch_dtype")
    return next((dtype.name for dtype in DTYPES if dtype.name == stated and dtype.fits_float32), "float32")


def _dtype_in(trace: Trace) -> str:
    """The dtype that a trace was recorded in; empty if it does not state one."""
    return next((worker.process.dtype for worker in trace.workers), "")
