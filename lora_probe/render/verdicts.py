"""The answer of each command in one sentence: the first line of its text, the title of its page, all of `--quiet`.

In: a command's result. Out: a `Verdict`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_probe.names import in_words, name_modules, path_of
from lora_probe.render.cells import SEVERITIES, one_line, size, words
from lora_probe.render.places import relative

if TYPE_CHECKING:
    from rich.text import Text as RichText

    from lora_probe.adapter import Adapter
    from lora_probe.adapter.one_module import OneModule
    from lora_probe.adapter.side_by_side import AdapterDiff
    from lora_probe.checking import Report
    from lora_probe.checking.cost import ServingCost
    from lora_probe.comparison import Comparison, Comparisons
    from lora_probe.merging.parity import Parity
    from lora_probe.recording.benchmarks import Benchmarks
    from lora_probe.render.document import Tone
    from lora_probe.render.results import CheckResult, Inspection, Recording
    from lora_probe.rules import Diagnostic

STYLES: dict[Tone, str] = {"good": "bold green", "bad": "bold red", "open": "bold yellow", "plain": "bold"}

COMPARED: dict[str, Tone] = {"agree": "good", "differ": "bad", "undecided": "open"}


@dataclass(frozen=True)
class Verdict:
    """A sentence from untrusted parts, and what it means."""

    text: str
    tone: Tone

    @property
    def line(self) -> RichText:
        """The sentence for a terminal."""
        return words(self.text, style=STYLES[self.tone])


def of_adapter(adapter: Adapter) -> Verdict:
    """`LoRA, rank 8, scaling 2: 90 modules (layers 0-29 q_proj, k_proj, v_proj), 2.48 MiB in F32`."""
    config = adapter.config
    ranks = sorted({module.rank for module in adapter.modules if module.rank is not None}) or [config.rank]
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    scalings = sorted({module.scaling for module in adapter.modules}) or [config.scaling]
    scaling = f"scaling {scalings[0]:g}" if len(scalings) == 1 else f"scalings {scalings[0]:g} to {scalings[-1]:g}"
    named = f" ({name_modules(path_of(module.key) for module in adapter.modules)})" if adapter.modules else ""
    stored = f"{size(adapter.weights.size)} in {', '.join(adapter.dtypes) or 'no tensors'}"
    return Verdict(
        f"{config.kind}, {rank}, {scaling}: {plural(len(adapter.modules), 'module')}{named}, {stored}", "plain"
    )


def of_inspection(result: Inspection) -> Verdict:
    return of_adapter(result.adapter)


def of_module(selected: OneModule) -> Verdict:
    pair, spectrum = selected.module, selected.spectrum
    if spectrum is None:
        effect = "A and B do not form a pair"
    elif not spectrum.finite:
        effect = "A or B contains NaN or infinity"
    else:
        effect = f"‖ΔW‖ {spectrum.norm:.4g}, effective rank {spectrum.effective_rank:.2f} of {pair.rank}"
    return Verdict(f"{path_of(pair.key)}: {effect}", "plain" if spectrum and spectrum.finite else "bad")


def of_diff(diff: AdapterDiff) -> Verdict:
    from lora_probe.adapter.diff_verdict import verdict

    return Verdict(verdict(diff), "good" if diff.same else "bad")


def of_check(result: CheckResult) -> Verdict:
    """Of one adapter its findings, of several how many have some."""
    if len(result.reports) == 1 and not result.not_judged:
        return of_report(result.reports[0])
    return of_reports(result.reports, len(result.not_judged))


def of_report(report: Report) -> Verdict:
    """`2 errors, 1 warning in ckpt/; 3 rules were not run`."""
    where = f"in {name_of(report).rstrip('/')}/{ignored(report.ignored)}"
    if count := rules_not_run(report):
        where += f"; {plural(count, 'rule')} {'was' if count == 1 else 'were'} not run"
    if not report.diagnostics:
        return Verdict(f"no findings {where}", "open" if count else "good")
    worst = worst_first(report.diagnostics)[0].severity
    return Verdict(f"{counts(report.diagnostics)} {where}", "bad" if worst == "error" else "open")


def of_reports(reports: Sequence[Report], lost: int) -> Verdict:
    """All adapters in one line, each counted once."""
    states = Counter(map(state, reports))
    texts = {"ok": "without findings", "unknown": "not fully judged", "info": "with infos", "warning": "with warnings"}
    texts |= {"error": "with errors"}
    parts = [f"{states[name]} {text}" for name, text in texts.items() if states[name]]
    parts += [f"{lost} not judged"] if lost else []
    every = counts([diagnostic for report in reports for diagnostic in report.diagnostics])
    unselected = sum(report.ignored for report in reports)
    tone: Tone = "bad" if states["error"] or lost else "good" if states["ok"] == len(reports) else "open"
    text = f"{plural(len(reports) + lost, 'adapter')}: {', '.join(parts)}{every and '; '}{every}{ignored(unselected)}"
    return Verdict(text, tone)


def of_recording(result: Recording) -> Verdict:
    """The headline of the newest load of each adapter."""
    from lora_probe.comparison.recorded import unfinished
    from lora_probe.render.json.trace import NO_LOAD

    trace = result.trace
    if not result.adapters:
        return Verdict("no adapter has been loaded yet" if trace.running else NO_LOAD.message, "open")
    newest = [adapter.newest for adapter in result.adapters]
    findings = [f"{finding.code} {finding.message}" for entry in newest for finding in entry.findings]
    headlines: dict[str, list[str]] = {}
    for adapter in result.adapters:
        headlines.setdefault(adapter.newest.headline, []).append(adapter.name)
    named = [text if len(headlines) == 1 else f"{in_words(names)}: {text}" for text, names in headlines.items()]
    every = f"{len(result.adapters)} adapters: " if len(headlines) == 1 < len(result.adapters) else ""
    sound = all(entry.sound for entry in newest) and not findings
    whole = not unfinished(trace)
    ends = [] if whole or trace.running else ["the recording is incomplete"]
    tone: Tone = "bad" if not sound else "good" if whole or trace.running else "open"
    return Verdict(every + "; ".join([*named, *findings, *ends]), tone)


def of_cost(result: ServingCost) -> Verdict:
    """`12.4 MiB for each slot with --max-lora-rank 16 --max-loras 1; 1.23 MiB with --max-lora-rank 8 --max-loras 1`."""
    given, least = result.given, result.fitting
    fitting = f"{size(least.slot)} for each slot with {least.flags.words}"
    if result.refused:
        return Verdict(f"vLLM refuses this adapter: {result.refused}", "bad")
    if not result.fits:
        return Verdict(f"vLLM does not apply all of this adapter with {given.flags.words}; {fitting}", "bad")
    if given.slot <= least.slot:
        return Verdict(fitting, "good")
    return Verdict(f"{size(given.slot)} for each slot with {given.flags.words}; {fitting}", "open")


def of_benchmarks(result: Benchmarks) -> Verdict:
    """`18 measurements: 12 of 14 targets met, 1 within the noise; missed: recording tensors; parity --weights-only`."""
    targets, count = result.targets, plural(len(result.measurements), "measurement")
    if not targets:
        return Verdict(f"{count}, none with a target", "plain")
    missed = list(dict.fromkeys(measurement.title for measurement, ratio in targets if ratio.missed))
    met = sum(ratio.met for _, ratio in targets)
    undecided = sum(not ratio.met and not ratio.missed for _, ratio in targets)
    open_ones = f", {undecided} within the noise" if undecided else ""
    ends = f"; missed: {'; '.join(missed)}" if missed else ""
    tone: Tone = "bad" if missed else "open" if undecided else "good"
    return Verdict(f"{count}: {met} of {plural(len(targets), 'target')} met{open_ones}{ends}", tone)


def of_comparison(result: Comparison) -> Verdict:
    """Whether the traces agree, and the worst module."""
    return Verdict(_compared(result), COMPARED[result.verdict])


def in_short(result: Comparison) -> Verdict:
    """The verdict with the rule of its cause, for a line that stands alone."""
    verdict, cause = of_comparison(result), result.cause
    if cause is None:
        return verdict
    return Verdict(f"{verdict.text}; cause: {cause.code} {cause.name}: {cause.message}", verdict.tone)


def _exceeding(different: int, total: int) -> str:
    return f"{different} of {total} modules exceed" if different else "no module exceeds"


def _compared(result: Comparison) -> str:
    worst = result.worst
    about = f"; worst module {result.name(worst.key)}: {worst.error:.1e}" if worst and worst.error is not None else ""
    allowed = "that rounding may cause" if result.measured else "allowed"
    rounding = f", of {result.tolerance:.1e} {allowed}" if about else ""
    different = sum(diff.status != "ok" for diff in result.modules)
    if not result.modules:
        answers = result.outputs.adapter
        about = f"; {answers.same} of {answers.tokens} answer tokens are the same" if answers.tokens else ""
        return {
            "agree": f"the traces agree in their answers{about}",
            "differ": f"the traces differ{about}",
            "undecided": f"undecided: not everything could be compared{about}",
        }[result.verdict]
    return {
        "agree": f"the traces agree on {len(result.modules)} modules{about}{rounding}",
        "differ": f"the traces differ: {_exceeding(different, len(result.modules))} the tolerance{about}",
        "undecided": f"undecided: not everything could be compared{about}",
    }[result.verdict]


def of_comparisons(result: Comparisons) -> Verdict:
    """The verdict over the comparisons of all adapters."""
    names: dict[str, list[str]] = {}
    for name, of_adapter in result.by_adapter.items():
        names.setdefault(of_adapter.verdict, []).append(name)
    clauses = {"agree": "agree on", "differ": "differ in", "undecided": "are undecided on"}
    text = ", ".join(f"{clause} {in_words(names[kind])}" for kind, clause in clauses.items() if kind in names)
    text = f"the traces {text}"
    if result.notes and result.verdict == "undecided":
        text = f"undecided: not every adapter has a counterpart; {text}"
    return Verdict(text, COMPARED[result.verdict])


def of_parity(result: Parity) -> Verdict:
    """`verified`, or the worst diagnostic."""
    weights, outputs = result.weights, result.outputs
    if result.verdict != "verified":
        worst = sorted(result.diagnostics, key=lambda diagnostic: diagnostic.severity != "error")
        about = worst[0].message if worst else "the adapter has no module that could be compared"
        return Verdict(f"{result.verdict}: {about}", "bad")
    text = f"verified: {len(weights.modules)} of {len(weights.modules)} modules merged correctly"
    if weights.effect_kept is not None:
        text += f", {100 * weights.effect_kept:.1f} % of the change kept"
    if outputs is not None and outputs.survives is not None:
        text += f", {100 * outputs.survives:.2f} % of the effect survives"
    return Verdict(text, "good")


def name_of(report: Report) -> str:
    """The folder of a report, as a person would write it."""
    return one_line(relative(report.adapter))


def state(report: Report) -> str:
    """The adapter in one word: its worst diagnostic, or `unknown` if that is no error and rules were not run."""
    first = next(iter(worst_first(report.diagnostics)), None)
    if first is not None and first.severity == "error":
        return "error"
    if rules_not_run(report):
        return "unknown"
    return "ok" if first is None else first.severity


def rules_not_run(report: Report) -> int:
    return len({code for skipped in report.not_run for code in skipped.codes})


def worst_first(diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
    return sorted(diagnostics, key=lambda diagnostic: list(SEVERITIES).index(diagnostic.severity))


def counts(diagnostics: Iterable[Diagnostic]) -> str:
    """`2 errors, 1 warning`."""
    by_severity = Counter(diagnostic.severity for diagnostic in diagnostics)
    texts = {
        kind: f"{by_severity[kind]} {kind}" if kind == "info" else plural(by_severity[kind], kind)
        for kind in SEVERITIES
    }
    return ", ".join(text for kind, text in texts.items() if by_severity[kind])


def ignored(count: int) -> str:
    """The diagnostics of rules that were not selected."""
    return f" ({count} ignored)" if count else ""


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
