"""`trace` and `show` as text: a recorded run.

In: a `Recording`. Out: rich renderables: what became of each adapter, its contributions, the answers, the load
timeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text as RichText

from lora_probe.comparison.recorded import GRAPHS, recorded_rows, unfinished
from lora_probe.comparison.totals import Totals, totals
from lora_probe.names import in_words
from lora_probe.recording import StationRecord
from lora_probe.render.cells import SHOWN, words
from lora_probe.render.json.trace import NO_LOAD
from lora_probe.render.results import Recording
from lora_probe.render.tables import Facts
from lora_probe.render.text.adapters import alone, section
from lora_probe.render.text.answers import answers_table
from lora_probe.render.text.requests import requests_table
from lora_probe.render.text.timeline import timeline
from lora_probe.render.verdicts import of_recording

if TYPE_CHECKING:
    from lora_probe.comparison.recorded import AdapterLoads
    from lora_probe.recording import LoadEvent, Trace


def recording(result: Recording) -> RenderableType:
    """The whole run, or what the options select of it."""
    trace = result.trace
    entries = [entry for adapter in result.adapters for entry in adapter.loads]
    single = trace.run is not None and len(entries) < 2 and result.whole
    measured = _totals(result)
    parts: list[RenderableType] = []
    if single and entries:
        first, *rest = alone(result, entries[0], measured)
        parts += [first, *state(trace), *rest, words("")]
    else:
        parts += [*([of_recording(result).line] if len(result.adapters) > 1 else ()), *state(trace)]
        parts += _sections(result, measured, result.adapters)
    parts += _not_recorded(trace)
    if result.requests and measured is not None:
        parts += [*requests_table(result, measured), words("")]
    if trace.requests and result.whole:
        parts += [answers_table(trace), words("")]
    if result.whole or result.events:
        parts += [words("loading", style="bold"), *timeline(steps(result), result.events), words("")]
    return Group(*parts, Facts(*facts_of(trace)))


def steps(result: Recording) -> Sequence[LoadEvent]:
    """The load timeline. The sections have the last counts of rows in captured graphs."""
    events = result.trace.events
    return events if result.events else [event for event in events if event.stage != GRAPHS]


def followed(result: Recording) -> RenderableType:
    """The same without what does not change, for a picture of a recording that runs. Its last line is erased when the
    command is interrupted."""
    measured = _totals(result)
    parts: list[RenderableType] = [*state(result.trace)]
    # A terminal shows the beginning of a long picture.
    parts += _sections(result, measured, sorted(result.adapters, key=lambda adapter: adapter.newest.sound))
    if result.requests and measured is not None:
        parts += [*requests_table(result, measured), words("")]
    parts.append(Facts(*facts_of(result.trace)))
    return Group(*parts, words("drawn again when the recording changes; Ctrl-C ends this", style="dim"))


def _sections(result: Recording, measured: Totals | None, adapters: Sequence[AdapterLoads]) -> Iterator[RenderableType]:
    if not adapters:
        yield words(_no_load(result.trace), style="bold yellow")
        yield words("")
    for adapter in adapters:
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


def facts_of(trace: Trace) -> Iterator[tuple[str, str]]:
    """What was recorded, with which versions, and what the recording changed."""
    process = next((worker.process for worker in trace.workers), None)
    versions = (process.versions if process else {}) | (trace.run.versions if trace.run else {})
    known = (name for name in ("vllm", "peft", "torch", "transformers") if name in versions)
    yield "trace", str(trace.path)
    yield "engine", ", ".join([trace.engine, *(f"{name} {versions[name]}" for name in known)])
    if trace.run is not None or trace.loads:
        yield _adapters(trace)
    if process is not None:
        if model := _model(process.settings):
            yield "model", model
        if process.dtype:
            yield "run in", f"{process.dtype} on {process.device}, kept: {process.keep}"
    if changed := [change for p in trace.processes for change in p.process.changed]:
        yield "changed", f"for the recording: {', '.join(changed)}"


def _adapters(trace: Trace) -> tuple[str, str]:
    """What was recorded: the adapter of a run by its folder, those of a server by their names."""
    names = list(dict.fromkeys(load.name for load, _ in trace.loads))
    if trace.run is not None and "url" in trace.run.spec.options:
        spec = trace.run.spec
        compared = f", compared with {spec.adapter}" if spec.adapter is not None else ""
        return "adapter", f"{spec.name} at {spec.options['url']}{compared}"
    if trace.run is not None:
        paths = [trace.run.spec.adapter or "none: the model by itself", *(one.path for one in trace.run.spec.beside)]
        how = " together" if trace.run.spec.together else ""
        return f"adapter{'s' if len(paths) > 1 else ''}{how}", in_words(paths)
    if len(names) == 1:
        return "adapter", names[0]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "adapters", in_words([*names[:SHOWN], *more])


def _model(settings: dict[str, object]) -> str:
    """The base model, the model runner and how the engine runs steps, as far as a server recorded them."""
    parts = [str(settings["model"])] if settings.get("model") else []
    if runner := settings.get("model_runner"):
        parts.append(f"model runner {runner}")
    if settings.get("enforce_eager") is True:
        parts.append("eager")
    elif compiled := settings.get("compiled"):
        parts.append(f"the engine {compiled}")
        if every := settings.get("sample"):
            parts.append(f"one step in {every} is run eager and observed")
    return ", ".join(parts)


def state(trace: Trace) -> Iterator[RichText]:
    """Whether the recording runs, is complete, and has all its rows."""
    if trace.running:
        yield words(f"running: {_so_far(trace)}", style="bold cyan")
    if not trace.processes or unfinished(trace):
        yield words(f"incomplete: {_incomplete(trace)}; the data below may end early", style="bold red")
    if removed := trace.dropped.rows:
        yield words(f"{removed:,} rows were removed to keep the recording under its size limit", style="yellow")
    if missing := trace.dropped.lost_rows:
        yield words(f"{missing:,} rows could not be written", style="bold red")
    if others := trace.other_runs:
        names = [str(path) for path in others[:SHOWN]]
        more = [f"{len(others) - SHOWN} more"] if len(others) > SHOWN else []
        yield words(f"other runs in this folder: {in_words([*names, *more])}")


def _so_far(trace: Trace) -> str:
    """What a running recording has on disk."""
    if count := recorded_rows(trace):
        return f"{count:,} rows so far"
    if any(worker.process.keep == "events" for worker in trace.workers):
        return "contributions are not recorded at level events"
    judged = any(record.station == "applied" for worker in trace.workers for record in worker.of(StationRecord))
    return "no rows on disk yet" if judged else "no request yet"


def _incomplete(trace: Trace) -> str:
    """Why a recording that has ended is not complete."""
    ended = unfinished(trace)
    if missing := sum(process.missing for process in trace.processes):
        return f"{missing} segments of {', '.join(ended)} are missing"
    unclosed = [p.folder.name for p in trace.processes if p.folder.name in ended and not p.process.closed]
    if ended and not unclosed:
        return f"not all data of {', '.join(ended)} could be written"
    return f"{', '.join(unclosed)} did not exit cleanly" if unclosed else "no process started"


def _no_load(trace: Trace) -> str:
    return "no adapter has been loaded yet" if trace.running else NO_LOAD.message


def _not_recorded(trace: Trace) -> Iterable[RenderableType]:
    if trace.unjoined:
        yield words(f"contributions are not shown: {trace.unjoined}")
    for worker in trace.workers:
        if worker.process.not_recorded:
            yield words(f"contributions not recorded: {worker.process.not_recorded}", style="bold yellow")
