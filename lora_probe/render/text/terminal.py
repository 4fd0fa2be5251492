"""What a person sees in a terminal: functions named after what they show, giving rich renderables.

In: an adapter, a trace, a comparison, rules. Out: tables and sentences. Colour never carries meaning alone: every
cell is a number or a word first, and NO_COLOR loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as RichText

from lora_probe.adapter import Adapter
from lora_probe.adapter.spectrum import Spectrum
from lora_probe.ledger import STATIONS, Ledger, Station, headline
from lora_probe.names import Key, layer_of, name_modules, natural, projection_of, ranges
from lora_probe.render.cells import add_row, assemble, columns_of, grid, paragraphs, words
from lora_probe.render.json import contributions_json, requests_json
from lora_probe.rules import diagnose

if TYPE_CHECKING:
    from lora_probe.comparison import Comparison
    from lora_probe.recording import LoadEvent, Trace

SHOWN = 10
"""Similar lines before the rest is only counted."""
STEPS = 200
"""Lines of the loading story, unless the whole is wanted."""


def size(count: int) -> str:
    """Bytes in MiB with three digits, or in KiB where that says more."""
    return f"{count / 2**20:.3g} MiB" if count >= 2**20 else f"{count / 2**10:.3g} KiB"


def adapter(found: Adapter) -> RenderableType:
    """What a checkpoint holds, from its header."""
    config = found.config
    kind = "LoRA" + "".join(f" + {word}" for word in config.variants)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in (
        ("adapter", str(found.path)),
        ("kind", f"{kind}, rank {config.rank}, alpha {config.alpha:g}, scaling {config.scaling:g}"),
        ("base model", config.base_model or "not named in the config"),
        ("PEFT", config.peft_version or "version not written (before 0.18)"),
        ("targets", _targets(found)),
        ("size", f"{size(found.weights.size)}, {found.parameters:,} parameters, {', '.join(found.dtypes) or 'empty'}"),
        ("modules", f"{len(found.modules)} in {len(found.weights.tensors)} tensors"),
    ):
        add_row(facts, name, value)
    return Group(
        *(words(f"note: {note}", style="cyan") for note in found.notes),
        facts,
        words(""),
        _by_projection(found),
        *_rest(found),
    )


def _targets(found: Adapter) -> str:
    targets = found.config.target_modules
    if targets is None:
        return "none"
    return f"the expression {targets}" if isinstance(targets, str) else ", ".join(sorted(targets, key=natural))


def _by_projection(found: Adapter) -> RenderableType:
    table = columns_of("projection", "modules", "layers", "A", "B", "rank", "scaling", "dtype")
    groups: dict[tuple[str, ...], list[int | None]] = {}
    for module in found.modules:
        name = projection_of(module.module) + ("" if module.parameter == "weight" else f" {module.parameter}")
        tensors = (module.a, module.b)
        shapes = tuple("missing" if t is None else "×".join(map(str, t.shape)) or "scalar" for t in tensors)
        dtypes = ", ".join(dict.fromkeys(t.dtype for t in tensors if t is not None))
        facts = (name, *shapes, str(module.rank), f"{module.scaling:g}", dtypes)
        groups.setdefault(facts, []).append(layer_of(module.module))
    for facts in sorted(groups, key=lambda facts: natural(facts[0])):
        layers = [layer for layer in groups[facts] if layer is not None]
        add_row(table, facts[0], str(len(groups[facts])), ranges(layers) or "-", *facts[1:])
    return table


def _rest(found: Adapter) -> Iterable[RenderableType]:
    kinds: dict[tuple[str, bool], list[str]] = {}
    for other in found.others:
        kinds.setdefault((other.what, other.understood), []).append(other.tensor.name)
    for module in found.modules:
        for extra in module.extras:
            kinds.setdefault(("beside lora_A and lora_B: " + extra.name.rpartition(".lora_")[2], True), []).append(
                extra.name
            )
    for (what, understood), names in kinds.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        style = "" if understood else "bold yellow"
        yield words(f"{len(names)} other tensors: {what}: {shown}", style=style)
    if found.files:
        yield words(f"also in the folder: {', '.join(found.files)}", style="dim")


def norms(found: Adapter, spectra: Mapping[str, Spectrum | None]) -> RenderableType:
    """‖ΔW‖ and effective rank, layers down and projections across."""
    cells: dict[Key, tuple[float | None, str]] = {}
    for module in found.modules:
        spectrum = spectra[module.stored_as]
        if spectrum is None:
            cells[module.key] = None, "no pair"
        elif not spectrum.finite:
            cells[module.key] = None, "not finite"
        else:
            cells[module.key] = spectrum.norm, f"{spectrum.norm:.3g} r {spectrum.effective_rank:.1f}"
    title = "‖ΔW‖ = ‖s·B·A‖, and its effective rank r"
    return grid(title, cells)


def run(trace: Trace, story: bool = False) -> RenderableType:
    """A recorded run: loading story, ledger, contributions, answers."""
    parts: list[RenderableType] = [_heading(trace)]
    parts += [words("loading", style="bold"), *_story(trace.events, story), words("")]
    for load, found in trace.loads:
        several = f"{load.name} (load {load.load}): " if len(trace.loads) > 1 else ""
        parts += [ledger(found, several), *_said(trace.engine, load.said, found), words("")]
    if not trace.loads:
        parts += [words("no adapter was loaded in this recording", style="bold yellow"), words("")]
    if cells := _contribution_cells(trace):
        parts += [grid("contribution ‖s·x·A·B‖ / ‖base output‖, over all rows of the adapter", cells), words("")]
    parts += _not_recorded(trace)
    if trace.requests:
        parts.append(answers(trace))
    return Group(*parts)


def _heading(trace: Trace) -> RenderableType:
    process = next((p.process for p in trace.workers), None)
    adapter_name = trace.run.spec.adapter if trace.run else trace.loads[0][0].path if trace.loads else "?"
    versions = (process.versions if process else {}) | (trace.run.versions if trace.run else {})
    numbers = ", ".join(
        f"{name} {versions[name]}" for name in ("vllm", "peft", "torch", "transformers") if name in versions
    )
    lines = [
        assemble(("trace ", "bold"), f"{trace.path}   engine {trace.engine}   {numbers}"),
        assemble(("adapter ", "bold"), adapter_name or "none: a model by itself"),
    ]
    if process is not None:
        lines.append(assemble(("runs in ", "bold"), f"{process.dtype} on {process.device}, kept: {process.keep}"))
    changed = [change for p in trace.processes for change in p.process.changed]
    if changed:
        lines.append(words(f"for the recording: {', '.join(changed)}", style="dim"))
    if not trace.complete:
        what = f"{', '.join(trace.unclosed)} did not close" if trace.unclosed else "no process began"
        if missing := sum(process.missing for process in trace.processes):
            what = f"{missing} segments of {', '.join(trace.unclosed)} are missing"
        lines.append(words(f"incomplete: {what}; what follows ends where the recording ended", style="bold red"))
    return Group(*lines, words(""))


def _story(events: Sequence[LoadEvent], whole: bool) -> Iterable[RenderableType]:
    """The steps of loading. Steps of the same kind on many modules are one line, unless the whole is wanted."""
    table = Table.grid(padding=(0, 2))
    for justify in ("right", "left", "left", "right"):
        table.add_column(justify=justify, overflow="fold")
    groups = [[event] for event in events] if whole else _kinds(events)
    for group in groups if whole else groups[:STEPS]:
        first, count = group[0], len(group)
        times = [event.seconds for event in group if event.seconds is not None]
        where = first.module if count == 1 else f"{count} × {_modules(group)}"
        add_row(
            table,
            f"{first.at:.3f} s",
            first.stage,
            f"{where}  {first.text}" if where else first.text,
            _duration(sum(times)) if times else "",
        )
    yield table
    if not whole and len(groups) > STEPS:
        yield words(f"and {len(groups) - STEPS:,} more lines; --events prints all")


def _kinds(events: Iterable[LoadEvent]) -> list[list[LoadEvent]]:
    """Steps on modules with the same words in one group, until a step without a module comes between."""
    groups: list[list[LoadEvent]] = []
    kinds: dict[tuple[str, str], list[LoadEvent]] = {}
    for event in events:
        kind = event.stage, event.text
        if not event.module:
            kinds.clear()
            groups.append([event])
        elif kind in kinds:
            kinds[kind].append(event)
        else:
            groups.append([event])
            kinds[kind] = groups[-1]
    return groups


def _modules(group: Sequence[LoadEvent]) -> str:
    names = dict.fromkeys(projection_of(event.module) for event in group)
    layers = [layer for event in group if (layer := layer_of(event.module)) is not None]
    return ", ".join(names) + (f" (layers {ranges(layers)})" if layers else "")


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def ledger(found: Ledger, prefix: str = "") -> RenderableType:
    """The headline, and a table of what was lost or wrong."""
    good = found.healthy
    parts: list[RenderableType] = [words(prefix + headline(found), style="bold green" if good else "bold red")]
    if good or found.refused:
        return Group(*parts, *_hints(found, with_message=True), *_unjudged(found))
    return Group(*parts, stations(found), *_hints(found))


def stations(found: Ledger, title: str = "modules") -> RenderableType:
    """Modules that fare alike in a row, under the stations that the ledger knows of."""
    known = [station for station in STATIONS if any(station in row.stations for row in found.rows)]
    table = columns_of(title, *known, "fate")
    for values, modules in alike(found).items():
        label = f"{len(modules)}: {name_modules(modules)}"
        add_row(table, label, *(_verdict(value) for value in values))
    return table


def alike(found: Ledger) -> dict[tuple[str, ...], list[str]]:
    """The modules that have the same at every station, by these values and the fate."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in found.rows:
        fate = "takes effect" if found.predicted and row.fate == "took effect" else row.fate
        values = (row.stations[station].value for station in STATIONS if station in row.stations)
        groups.setdefault((*values, fate), []).append(row.module)
    return groups


def _unjudged(found: Ledger) -> Iterable[RenderableType]:
    """Stations of healthy modules that were not measured: nothing was seen to be wrong, as nobody looked."""
    reasons: dict[tuple[Station, str], int] = {}
    for row in found.rows if found.healthy else ():
        for station in STATIONS:
            if row.stations[station].value == "unknown":
                reason = station, row.stations[station].message
                reasons[reason] = reasons.get(reason, 0) + 1
    for (station, message), count in reasons.items():
        yield words(f"  {station} was not measured for {count} of them: {message}", style="yellow")


def _verdict(value: str) -> RichText:
    bad = dict.fromkeys(("wrong", "absent", "lost"), "bold red")
    styles = bad | dict.fromkeys(("ok", "took effect", "takes effect"), "green")
    return words(value, style=styles.get(value, "yellow"))


def _hints(found: Ledger, with_message: bool = False) -> Iterable[RenderableType]:
    for diagnostic in diagnose(found):
        if with_message and diagnostic.modules:
            yield words(f"  {diagnostic.message}")
        yield words(f"  {diagnostic.code} {diagnostic.name}: {diagnostic.hint}", style="cyan")


def _said(engine: str, said: Sequence[str], found: Ledger) -> Iterable[RenderableType]:
    if found.healthy or found.refused:
        return
    if not said:
        yield words(f"{engine} said nothing: no log line at INFO or above while it loaded the adapter")
    for line in said[:SHOWN]:
        yield words(f"{engine} said: {line}")


def _contribution_cells(trace: Trace) -> dict[Key, tuple[float | None, str]]:
    fates = {row.key: row.fate for _, found in trace.loads for row in found.rows}
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
        yield words(f"{len(trace.workers)} workers hold shards of the layers: their rows are not joined yet")
    for process in trace.workers:
        if process.process.not_recorded:
            yield words(f"contributions not recorded: {process.process.not_recorded}", style="bold yellow")


def answers(trace: Trace) -> RenderableType:
    """Each prompt with the base's answer and the adapter's."""
    texts = [prompt.text for prompt in trace.run.spec.prompts] if trace.run else []
    table = columns_of("prompt", "base", "with the adapter")
    numbers = {request.id: request.prompt for request in trace.requests}
    for entry in requests_json(trace):
        number = numbers[entry["id"]]
        prompt = texts[number] if 0 <= number < len(texts) else f"{len(entry['prompt_ids'])} tokens"
        with_adapter = entry["text"] if entry["adapter"] else "-"
        base = entry["base_text"] if entry["base_text"] is not None else "-"
        add_row(table, *(" ".join(text.split()) for text in (prompt, base, with_adapter)))
    return table


def comparison(found: Comparison) -> RenderableType:
    """Two traces against each other: relative error by module, first divergence, tokens, both ledgers."""
    parts: list[RenderableType] = []
    for side, trace, one in zip(
        ("reference", "candidate"), (found.reference, found.candidate), found.ledgers, strict=True
    ):
        style = "green" if one.healthy else "bold red"
        parts.append(assemble((f"{side} ", "bold"), f"{trace.path} ({trace.engine}): ", (headline(one), style)))
    parts += [words(f"note: {note}", style="bold yellow") for note in found.notes]
    parts.append(words(""))
    if found.modules:
        cells = {
            diff.key: (diff.error, f"{diff.error:.1e}" + ("" if diff.status == "ok" else "!"))
            if diff.error is not None
            else (None, diff.status)
            for diff in found.modules
        }
        title = (
            f"relative error of s·x·A·B, {found.candidate.engine} against {found.reference.engine}, "
            f"{found.rows} rows; tolerance {found.tolerance:.1e} ({found.dtype or 'no dtype recorded'})"
        )
        parts += [grid(title, cells), *_measure_notes(found), words("")]
    if found.requests:
        parts.append(_tokens(found))
    parts += [_first(found), _sentence(found)]
    return Group(*parts)


def _measure_notes(found: Comparison) -> Iterable[RenderableType]:
    if any(not diff.exact for diff in found.modules if diff.error is not None):
        yield words(
            "some errors are bounded from below by norms: the runs hold another B, or kept no shrink", style="dim"
        )


def _tokens(found: Comparison) -> RenderableType:
    lines = []
    for request in found.requests:
        one, two = len(request.reference.output_ids), len(request.candidate.output_ids)
        said = f"all {one} answer tokens the same"
        if not request.equal:
            said = f"the answers part at token {request.same_tokens + 1} of {one} and {two}"
        elif request.logprob_error is not None:
            said += f", largest difference of a logprob {request.logprob_error:.1e}"
        lines.append(f"prompt {request.prompt + 1}: {said}")
    return paragraphs("\n".join(lines))


def _first(found: Comparison) -> RenderableType:
    if found.first is None:
        return words("no row of any module lies beyond the tolerance" if found.rows else "no rows were compared")
    first = found.first
    token = f"answer token {first.token + 1}" if first.token >= 0 else f"prompt token {first.position + 1}"
    where = f"{name_modules([first.key[0]])}, prompt {first.prompt + 1}, {token}"
    return words(f"first divergence: {where}: error {first.error:.1e}", style="bold red")


def _sentence(found: Comparison) -> RenderableType:
    worst = found.worst
    about = (
        f"; worst module {name_modules([worst.module])}: {worst.error:.1e}" if worst and worst.error is not None else ""
    )
    text = {
        "agree": f"the traces agree on {len(found.modules)} modules{about}",
        "differ": f"the traces differ: {_what_differs(found)}{about}",
        "undecided": f"undecided: not everything could be compared{about}",
    }[found.verdict]
    return words(text, style="bold green" if found.verdict == "agree" else "bold red")


def _what_differs(found: Comparison) -> str:
    bad = sum(diff.status != "ok" for diff in found.modules)
    if bad:
        return f"{bad} of {len(found.modules)} modules"
    if any(not ledger.healthy for ledger in found.ledgers):
        return "in their ledgers"
    return "in their answers"


def versions(found: Mapping[str, str]) -> RenderableType:
    return paragraphs("\n".join(f"{name} {number}" for name, number in found.items()))
