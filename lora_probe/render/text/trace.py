"""`trace` and `show` as text: a recorded run.

In: a `Recording`. Out: rich renderables: the heading, a section for each adapter, requests, load timeline, answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from lora_probe.comparison.recorded import dropped, other_runs, recorded_rows, running, unfinished
from lora_probe.comparison.totals import Totals, totals
from lora_probe.names import in_words
from lora_probe.render.cells import SHOWN, assemble, words
from lora_probe.render.json.trace import NO_LOAD
from lora_probe.render.results import Recording
from lora_probe.render.text.adapters import alone, section
from lora_probe.render.text.answers import answers_table
from lora_probe.render.text.requests import requests_table
from lora_probe.render.text.timeline import timeline

if TYPE_CHECKING:
    from lora_probe.recording import Trace


def recording(result: Recording) -> RenderableType:
    """The whole run, or what the options select of it."""
    trace = result.trace
    entries = [entry for adapter in result.adapters for entry in adapter.loads]
    # One adapter in a run of `trace`: the steps come first, in the order in which they happened.
    single = trace.run is not None and len(entries) < 2 and result.whole
    steps = [words("loading", style="bold"), *timeline(trace.events, result.events), words("")]
    parts: list[RenderableType] = [_heading(trace), *(steps if single else ())]
    measured = _totals(result)
    if single and entries:
        parts += [*alone(result, entries[0], measured), words("")]
    else:
        parts += _sections(result, measured)
    parts += _not_recorded(trace)
    if result.requests and measured is not None:
        parts += [*requests_table(result, measured), words("")]
    if not single and (result.whole or result.events):
        parts += steps
    if trace.requests and result.whole:
        parts.append(answers_table(trace))
    return Group(*parts)


def followed(result: Recording) -> RenderableType:
    """The same without what does not change, for a picture of a recording that runs. Its last line is erased when the
    command is interrupted."""
    measured = _totals(result)
    parts: list[RenderableType] = [_heading(result.trace)]
    parts += _sections(result, measured)
    if result.requests and measured is not None:
        parts += [*requests_table(result, measured), words("")]
    return Group(*parts, words("drawn again when the recording changes; Ctrl-C ends this", style="dim"))


def _sections(result: Recording, measured: Totals | None) -> Iterator[RenderableType]:
    if not result.adapters:
        yield words(_no_load(result.trace), style="bold yellow")
        yield words("")
    for adapter in result.adapters:
        yield from section(result, adapter, measured)
        yield words("")


def follow_lines(result: Recording) -> Iterator[str]:
    """The state of each adapter in one line, for a log."""
    if not result.adapters:
        yield _no_load(result.trace)
    for adapter in result.adapters:
        yield f"{adapter.name} (load {adapter.newest.number}): {adapter.newest.headline}"


def _totals(result: Recording) -> Totals | None:
    """The rows of the loads that are shown with a table; None, and nothing is read, if there is no table."""
    loads = [adapter.newest.number for adapter in result.adapters if adapter.newest.used]
    if result.requests:
        return totals(result.trace, ())
    many = len(result.adapters) > SHOWN and not result.everything
    return totals(result.trace, loads) if loads and not many else None


def _heading(trace: Trace) -> RenderableType:
    process = next((worker.process for worker in trace.workers), None)
    versions = (process.versions if process else {}) | (trace.run.versions if trace.run else {})
    numbers = ", ".join(
        f"{name} {versions[name]}" for name in ("vllm", "peft", "torch", "transformers") if name in versions
    )
    lines = [
        assemble(("trace ", "bold"), f"{trace.path}   engine {trace.engine}   {numbers}"),
        assemble(*_adapters(trace)),
    ]
    if process is not None:
        if model := _model(process.settings):
            lines.append(assemble(("model ", "bold"), model))
        lines.append(assemble(("run in ", "bold"), f"{process.dtype} on {process.device}, kept: {process.keep}"))
    changed = [change for p in trace.processes for change in p.process.changed]
    if changed:
        lines.append(words(f"changed for the recording: {', '.join(changed)}", style="dim"))
    return Group(*lines, *_state(trace), words(""))


def _adapters(trace: Trace) -> tuple[tuple[str, str], str]:
    """What was recorded: the adapter of a run by its folder, those of a server by their names."""
    names = list(dict.fromkeys(load.name for load, _ in trace.loads))
    if trace.run is not None:
        return ("adapter ", "bold"), trace.run.spec.adapter or "none: the model by itself"
    if len(names) < 2:
        return ("adapter ", "bold"), names[0] if names else "none was loaded"
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ("adapters ", "bold"), in_words([*names[:SHOWN], *more])


def _model(settings: dict[str, object]) -> str:
    """The base model, the model runner and how the engine runs steps, as far as a server recorded them."""
    parts = [str(settings["model"])] if settings.get("model") else []
    if runner := settings.get("model_runner"):
        parts.append(f"{runner} model runner")
    if settings.get("enforce_eager") is True:
        parts.append("eager")
    else:
        parts += [f"{name} {settings[name]}" for name in ("compilation", "cudagraphs") if settings.get(name)]
    return ", ".join(parts)


def _state(trace: Trace) -> Iterator[RenderableType]:
    """Whether the recording runs, is complete, and has all its rows."""
    if running(trace):
        count = recorded_rows(trace)
        yield words(f"running: {f'{count:,} rows so far' if count else 'no request yet'}", style="bold cyan")
    if not trace.processes or unfinished(trace):
        yield words(f"incomplete: {_incomplete(trace)}; the data below may end early", style="bold red")
    if removed := dropped(trace):
        yield words(f"{removed:,} rows were removed to keep the recording under its size limit", style="yellow")
    if others := other_runs(trace):
        names = [str(path) for path in others[:SHOWN]]
        more = [f"{len(others) - SHOWN} more"] if len(others) > SHOWN else []
        yield words(f"earlier runs in this folder: {in_words([*names, *more])}")


def _incomplete(trace: Trace) -> str:
    ended = unfinished(trace)
    if missing := sum(process.missing for process in trace.processes):
        return f"{missing} segments of {', '.join(ended)} are missing"
    return f"{', '.join(ended)} did not exit cleanly" if ended else "no process started"


def _no_load(trace: Trace) -> str:
    return "no adapter has been loaded yet" if running(trace) else NO_LOAD.message


def _not_recorded(trace: Trace) -> Iterable[RenderableType]:
    if trace.sharded:
        yield words(f"contributions are not shown: {len(trace.workers)} workers hold shards of the layers")
    for worker in trace.workers:
        if worker.process.not_recorded:
            yield words(f"contributions not recorded: {worker.process.not_recorded}", style="bold yellow")
