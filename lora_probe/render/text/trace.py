"""`trace` and `show` as text: a recorded run.

In: a `Recording`. Out: rich renderables: load timeline, ledger, contributions, answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from lora_probe.ledger import Ledger
from lora_probe.names import Key, Universe, name_modules
from lora_probe.render.cells import SHOWN, assemble, words
from lora_probe.render.json.trace import NO_LOAD, answers, base_answers, contributions_json
from lora_probe.render.results import Recording
from lora_probe.render.tables import add_row, columns_of, grid
from lora_probe.render.text.ledger import ledger_text
from lora_probe.rules.diagnostics import of_requests

if TYPE_CHECKING:
    from lora_probe.recording import LoadEvent, RequestRecord, Trace

MOST_NAMED = 200_000
"""More modules than any adapter has are only counted: names would take more memory than the trace."""
STEPS = 200
"""How many lines of the load timeline are printed without `--events`."""


def recording(result: Recording) -> RenderableType:
    """The whole run."""
    trace = result.trace
    parts: list[RenderableType] = [_heading(trace)]
    parts += [words("loading", style="bold"), *_timeline(trace.events, result.events), words("")]
    for load, ledger in trace.loads:
        name = f"{load.name} (load {load.load}): " if len(trace.loads) > 1 else ""
        parts += [ledger_text(ledger, name), *_of_requests(trace, load.load)]
        parts += [*_log_lines(trace.engine, load.said, ledger), words("")]
    if not trace.loads:
        parts += [words(NO_LOAD.message, style="bold yellow"), words("")]
    if cells := _contribution_cells(trace):
        parts += [grid("contribution ‖s·x·A·B‖ / ‖base output‖, over all rows of the adapter", cells), words("")]
    parts += _not_recorded(trace)
    if trace.requests:
        parts.append(_answers(trace))
    return Group(*parts)


def _heading(trace: Trace) -> RenderableType:
    process = next((worker.process for worker in trace.workers), None)
    adapter = trace.run.spec.adapter if trace.run else trace.loads[0][0].path if trace.loads else "?"
    versions = (process.versions if process else {}) | (trace.run.versions if trace.run else {})
    numbers = ", ".join(
        f"{name} {versions[name]}" for name in ("vllm", "peft", "torch", "transformers") if name in versions
    )
    lines = [
        assemble(("trace ", "bold"), f"{trace.path}   engine {trace.engine}   {numbers}"),
        assemble(("adapter ", "bold"), adapter or "none: the model by itself"),
    ]
    if process is not None:
        lines.append(assemble(("run in ", "bold"), f"{process.dtype} on {process.device}, kept: {process.keep}"))
    changed = [change for p in trace.processes for change in p.process.changed]
    if changed:
        lines.append(words(f"changed for the recording: {', '.join(changed)}", style="dim"))
    if not trace.complete:
        lines.append(words(f"incomplete: {_incomplete(trace)}; the data below may end early", style="bold red"))
    return Group(*lines, words(""))


def _incomplete(trace: Trace) -> str:
    if missing := sum(process.missing for process in trace.processes):
        return f"{missing} segments of {', '.join(trace.unclosed)} are missing"
    return f"{', '.join(trace.unclosed)} did not exit cleanly" if trace.unclosed else "no process started"


def _timeline(events: Sequence[LoadEvent], whole: bool) -> Iterable[RenderableType]:
    """The steps of loading. Without `whole`, equal steps on many modules share a line."""
    table = Table.grid(padding=(0, 2))
    for justify in ("right", "left", "left", "right"):
        table.add_column(justify=justify, overflow="fold")
    groups = [[event] for event in events] if whole else _alike(events)
    universes = {} if whole else _universes(events)
    for group in groups if whole else groups[:STEPS]:
        first, count = group[0], len(group)
        times = [event.seconds for event in group if event.seconds is not None]
        where = first.module if count == 1 else _modules(group, universes[first.stage])
        add_row(
            table,
            f"{first.at:.3f} s",
            first.stage,
            f"{where}  {first.text}" if where else first.text,
            _duration(sum(times)) if times else "",
        )
    yield table
    if not whole and len(groups) > STEPS:
        yield words(f"{len(groups) - STEPS:,} more lines; --events prints all of them")


def _alike(events: Iterable[LoadEvent]) -> list[list[LoadEvent]]:
    """Steps on modules with the same text in one group, up to the next step that is not about a module."""
    groups: list[list[LoadEvent]] = []
    current: dict[tuple[str, str], list[LoadEvent]] = {}
    for event in events:
        kind = event.stage, event.text
        if not event.module:
            current.clear()
            groups.append([event])
        elif kind in current:
            current[kind].append(event)
        else:
            groups.append([event])
            current[kind] = groups[-1]
    return groups


def _universes(events: Iterable[LoadEvent]) -> dict[str, Universe]:
    """The modules of each stage. The names of a module in the file and in the engine are not compared."""
    modules: dict[str, dict[str, None]] = {}
    for event in events:
        if event.module:
            modules.setdefault(event.stage, {})[event.module] = None
    return {stage: Universe(tuple(paths)) for stage, paths in modules.items()}


def _modules(group: Sequence[LoadEvent], universe: Universe) -> str:
    if len(universe.paths) > MOST_NAMED:
        return f"{len(group):,} modules"
    return f"{len(group)}: {name_modules([event.module for event in group], universe)}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _of_requests(trace: Trace, load: int) -> Iterable[RenderableType]:
    """What went wrong for requests while a load was active."""
    for finding in trace.request_findings:
        if finding.load == load:
            diagnostic = of_requests(finding.code, finding.message, trace.engine)
            yield words(diagnostic.message, style="bold red")
            yield words(f"  {diagnostic.code} {diagnostic.name}: {diagnostic.hint}", style="cyan")


def _log_lines(engine: str, lines: Sequence[str], ledger: Ledger) -> Iterable[RenderableType]:
    """What the engine logged while it loaded an adapter that did not take effect."""
    if ledger.healthy or ledger.refused:
        return
    if not lines:
        yield words(f"{engine} reported no log lines at INFO or above while it loaded the adapter")
    for line in lines[:SHOWN]:
        yield words(f"{engine} log: {line}")


def _contribution_cells(trace: Trace) -> dict[Key, tuple[float | None, str]]:
    fates = {row.key: row.fate for _, ledger in trace.loads for row in ledger.rows}
    cells: dict[Key, tuple[float | None, str]] = {
        key: (None, fate) for key, fate in fates.items() if fate in ("lost", "wrong")
    }
    for entry in contributions_json(trace):
        key = entry["module"], entry["parameter"], entry["expert"]
        strength = entry["strength"]
        if entry["rows"] == 0 or fates.get(key) == "lost":
            continue
        mark = " wrong" if fates.get(key) == "wrong" else ""
        cells[key] = strength, ("-" if strength is None else f"{strength:.3g}") + mark
    return cells if trace.rows is not None else {}


def _not_recorded(trace: Trace) -> Iterable[RenderableType]:
    if trace.sharded:
        yield words(f"contributions are not shown: {len(trace.workers)} workers hold shards of the layers")
    for worker in trace.workers:
        if worker.process.not_recorded:
            yield words(f"contributions not recorded: {worker.process.not_recorded}", style="bold yellow")


def _answers(trace: Trace) -> RenderableType:
    """Each prompt with the base model's answer and the adapter's. Forced tokens have a column of their own: no model
    chose them."""
    prompts = [prompt.text for prompt in trace.run.spec.prompts] if trace.run else []
    requests, bases = answers(trace), base_answers(trace)
    follows = any(trace.forced(request) for request in requests)
    table = columns_of("prompt", *(["forced (--follow)"] if follows else []), "base", "with the adapter")
    for request in requests:
        text = prompts[request.prompt] if 0 <= request.prompt < len(prompts) else ""
        cells = [_shown(text) if text else words(f"{len(request.prompt_ids)} tokens", style="dim")]
        if follows:
            cells.append(_forced(trace, request))
        cells.append(_generated(trace, bases.get(request.prompt)))
        cells.append(_generated(trace, request if request.adapter is not None else None))
        add_row(table, *cells)
    return table


def _forced(trace: Trace, request: RequestRecord) -> RichText:
    if request.forced_text is None:
        return _ids(request.output_ids[: trace.forced(request)])
    return _shown(request.forced_text)


def _generated(trace: Trace, request: RequestRecord | None) -> RichText:
    """What a model generated by itself, after the forced tokens if there are any."""
    if request is None:
        return words("(not run)", style="dim")
    count = trace.forced(request)
    text = request.generated_text if count else request.text
    if text is None:
        return _ids(request.output_ids[count:])
    return _shown(text)


def _ids(ids: Sequence[int]) -> RichText:
    """Tokens whose text was not recorded."""
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return words(f"token ids {', '.join(map(str, ids[:SHOWN]))}{more}", style="dim")


def _shown(text: str) -> RichText:
    """A text on one line. No text, or nothing but blanks, is not an empty cell."""
    line = " ".join(text.split())
    return words(line) if line else words("(only blanks)" if text else "(empty)", style="dim")
