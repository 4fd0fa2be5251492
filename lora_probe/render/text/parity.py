"""`parity` as text: a merge in the weights and in the outputs.

In: a `Parity`. Out: rich renderables: the verdict, the diagnostics, the table of modules, the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text as RichText

from lora_probe.comparison.effect import Effect, Measures
from lora_probe.merging.parity import Parity, later_in_outputs
from lora_probe.merging.report import MergeReport, ModuleMerge
from lora_probe.names import Key
from lora_probe.render.cells import SEVERITIES, words
from lora_probe.render.tables import Facts, Fitted, Grid, add_row, columns_of
from lora_probe.render.towers import Cell
from lora_probe.render.verdicts import of_parity
from lora_probe.rules import Diagnostic, all_rules

THIN = 16
"""With fewer answer tokens than this, a note asks for more prompts."""


def parity(result: Parity) -> RenderableType:
    """The verdict and its diagnostics, then the weights and the outputs."""
    weights = result.weights
    parts: list[RenderableType] = [of_parity(result).line]
    parts += [line for diagnostic in result.diagnostics for line in _diagnostic(diagnostic)]
    parts += [words(""), *counts(weights), words(""), Grid(SHARES, shares(weights))]
    parts += [words(f"PEFT warned: {line}") for line in result.warnings]
    if result.outputs is not None:
        parts += [words(""), *_outputs(result.outputs, weights)]
    return Group(*parts, words(""), Facts(*facts_of(result)))


def facts_of(result: Parity) -> tuple[tuple[str, str], ...]:
    """What was compared."""
    weights = result.weights
    made = f"made by PEFT in {result.made}" if result.made else f"{weights.merged}, {weights.merged_dtype}"
    base = f"{weights.base}, {weights.base_dtype}"
    return ("adapter", str(weights.adapter)), ("base model", base), ("merged", made)


SHARES = "share of ΔW = s·B·A in the merged weights (1: all of it)"


def shares(report: MergeReport) -> dict[Key, Cell]:
    """The share of each module. The experts of a layer share a cell, which is that of the worst."""
    groups: dict[Key, list[ModuleMerge]] = {}
    for module in report.modules:
        groups.setdefault((module.label.partition("[")[0], "weight", None), []).append(module)
    return {key: _worst([_cell(module) for module in modules]) for key, modules in groups.items()}


def _worst(cells: Sequence[Cell]) -> Cell:
    wrong = [cell for cell in cells if cell.bad]
    if not wrong:
        return min(cells, key=lambda cell: 1.0 if cell.value is None else cell.value)
    return wrong[0] if len(cells) == 1 else Cell(f"{len(wrong)} of {len(cells)} {wrong[0].text}", bad=True)


def _cell(module: ModuleMerge) -> Cell:
    wrong = [finding for finding in module.findings if finding.value in ("wrong", "absent")]
    if module.status == "verified":
        share = module.share
        return Cell("ΔW is 0" if share is None else f"{share:.3f}", share)
    if wrong and wrong[0].code == "LP703" and module.scaling and module.implied_scaling is not None:
        return Cell(f"× {module.implied_scaling / module.scaling:.4g}", bad=True)
    if module.status == "undecided":
        return Cell("not judged", bad=True)
    if not wrong:
        return Cell("missing" if module.share is None else "another base", bad=True)
    return Cell(all_rules()[wrong[0].code].short or wrong[0].code, bad=True)


def counts(report: MergeReport) -> Iterable[RichText]:
    """How many modules are merged in which way, and what else is in the files."""
    by_arithmetic: dict[str, int] = {}
    for module in report.modules:
        if module.status == "verified":
            exact = f"bit for bit {module.arithmetic}" if module.bit_exact else "the same effect, by unknown arithmetic"
            by_arithmetic[exact] = by_arithmetic.get(exact, 0) + 1
    for text, count in by_arithmetic.items():
        yield words(f"{count} of {len(report.modules)} modules: {text}")
    state = "all equal to the base" if not report.foreign else f"{report.foreign} of them differ from the base"
    yield words(f"{report.untouched} other tensors: {state}")
    if report.effect_kept is not None:
        kept = f"{100 * report.effect_kept:.2f} %"
        yield words(f"a correct merge in {report.merged_dtype} keeps {kept} of the change, by energy")
    speed = report.read / max(report.seconds, 1e-9) / 2**20
    yield words(f"{report.read / 2**20:,.0f} MiB compared in {report.seconds:.1f} s ({speed:,.0f} MiB/s)", style="dim")


def _outputs(effect: Effect, weights: MergeReport) -> Iterable[RenderableType]:
    yield words(f"outputs on the unmerged adapter's own answers, {effect.merged.engine}, {effect.dtype}", style="bold")
    yield outputs_table(effect)
    yield from outputs_lines(effect, weights)


def outputs_table(effect: Effect) -> Fitted:
    """How much of the effect survives in the answer to each prompt."""
    table = columns_of(
        "prompt", "tokens", "top-1", "first other token", "KL merged", "KL base", "logprob error", "survives"
    )
    run = effect.unmerged.run
    texts = [prompt.text for prompt in run.spec.prompts] if run else []
    for prompt in effect.prompts:
        first = prompt.first_token
        other = "none" if first is None else f"token {first.token + 1} ({first.unmerged} -> {first.merged})"
        name = " ".join(texts[prompt.prompt].split()) if prompt.prompt < len(texts) else f"{prompt.prompt + 1}"
        add_row(table, name, *_measures(prompt, other))
    add_row(table, "all", *_measures(effect, ""))
    return table


def outputs_lines(effect: Effect, weights: MergeReport) -> Iterator[RichText]:
    """What else the outputs show."""
    if effect.tokens < THIN:
        more = "pass prompts like the training data (--prompt, --chat) to learn more"
        yield words(f"only {effect.tokens} answer tokens; {more}", style="bold yellow")
    yield from _divergence(effect)
    if later := later_in_outputs(weights, effect):
        yield words(later)
    for note in effect.notes:
        yield words(note, style="bold yellow")


def _divergence(effect: Effect) -> Iterator[RichText]:
    """The first module whose output differs, or the one that is closest to it."""
    if effect.first_module is not None:
        first = effect.first_module
        yield words(
            f"merged and unmerged first differ at {effect.name(first.key)}: prompt {first.prompt + 1}, "
            f"position {first.position + 1}, error {first.error:.1e} (tolerance {effect.tolerance:.1e})",
            style="bold red",
        )
    elif effect.worst_module is not None:
        worst = effect.worst_module
        yield words(
            f"no module's output differs by more than {effect.tolerance:.1e}; "
            f"worst {effect.name(worst.key)}: {worst.error:.1e}"
        )


def _measures(measures: Measures, other: str) -> tuple[str, ...]:
    return (
        str(measures.tokens),
        _percent(measures.top1),
        other,
        _small(measures.kl_merged),
        _small(measures.kl_base),
        _small(measures.logprob_error),
        _percent(measures.survives),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _diagnostic(diagnostic: Diagnostic) -> Iterable[RenderableType]:
    yield words(f"{diagnostic.code} {diagnostic.name}: {diagnostic.message}", style=SEVERITIES[diagnostic.severity])
    yield words(f"  {diagnostic.hint}", style="cyan")
