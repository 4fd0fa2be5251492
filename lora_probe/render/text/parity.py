"""What a person sees of a merge: the table of modules, what was found, and what survives in the outputs.

In: a `Parity`. Out: tables and sentences, as in `terminal.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from lora_probe.comparison.effect import Effect, Measures
from lora_probe.merging.parity import Parity
from lora_probe.merging.report import MergeReport, ModuleMerge
from lora_probe.names import Key, name_modules
from lora_probe.render.cells import add_row, columns_of, grid, words
from lora_probe.rules import Diagnostic

WORDS = {
    "LP701": "not merged",
    "LP702": "twice",
    "LP704": "subtracted",
    "LP705": "another's",
    "LP706": "unexplained",
    "LP711": "not finite",
    "LP719": "not replaced",
    "LP720": "transposed",
    "LP721": "on the whole base",
    "LP722": "no magnitude",
}
"""What a cell says of a module that is wrong."""
THIN = 16
"""Fewer answer tokens than this are said to be few."""
SEVERE = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}


def parity(found: Parity) -> RenderableType:
    """Everything: the weights, the outputs, the verdict."""
    parts = [_facts(found), words(""), _modules(found.weights), *_counts(found.weights)]
    parts += [words(f"note: {note}", style="cyan") for note in found.weights.notes]
    parts += [words(f"PEFT warned: {line}") for line in found.warnings]
    if found.outputs is not None:
        parts += [words(""), *_outputs(found.outputs)]
    if found.diagnostics:
        parts.append(words(""))
        parts += [line for diagnostic in found.diagnostics for line in _diagnostic(diagnostic)]
    return Group(*parts, words(""), _verdict(found))


def _facts(found: Parity) -> RenderableType:
    weights = found.weights
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    merged = f"by PEFT, here, in {found.made}" if found.made else f"{weights.merged}, {weights.merged_dtype}"
    for name, value in (
        ("adapter", str(weights.adapter)),
        ("base model", f"{weights.base}, {weights.base_dtype}"),
        ("merged", merged),
    ):
        add_row(facts, name, value)
    return facts


def _modules(found: MergeReport) -> RenderableType:
    groups: dict[Key, list[ModuleMerge]] = {}
    for module in found.modules:
        # The experts of a layer share a cell.
        groups.setdefault((module.label.partition("[")[0], "weight", None), []).append(module)
    cells = {key: _cells(modules) for key, modules in groups.items()}
    return grid("share of ΔW = s·B·A that is in the merged weights (1: all of it)", cells)


def _cells(modules: Sequence[ModuleMerge]) -> tuple[float | None, str]:
    """One module's cell, or of several the worst."""
    cells = [_cell(module) for module in modules]
    wrong = [text for (_, text), module in zip(cells, modules, strict=True) if module.status != "verified"]
    if not wrong:
        return min(cells, key=lambda cell: 1.0 if cell[0] is None else cell[0])
    return None, wrong[0] if len(cells) == 1 else f"{len(wrong)} of {len(cells)} {wrong[0]}"


def _cell(module: ModuleMerge) -> tuple[float | None, str]:
    wrong = [finding for finding in module.findings if finding.value in ("wrong", "absent")]
    if module.status == "verified":
        share = module.share
        return (share, "ΔW is 0") if share is None else (share, f"{share:.3f}")
    if wrong and wrong[0].code == "LP703" and module.scaling and module.implied_scaling is not None:
        return None, f"× {module.implied_scaling / module.scaling:.4g}"
    if module.status == "undecided":
        return None, "not judged"
    if not wrong:
        return None, "missing" if module.share is None else "another base"
    return None, WORDS.get(wrong[0].code, wrong[0].code)


def _counts(found: MergeReport) -> Iterable[RenderableType]:
    by_arithmetic: dict[str, int] = {}
    for module in found.modules:
        if module.status == "verified":
            exact = f"bit for bit {module.arithmetic}" if module.bit_exact else "the same effect by unknown arithmetic"
            by_arithmetic[exact] = by_arithmetic.get(exact, 0) + 1
    for text, count in by_arithmetic.items():
        yield words(f"{count} of {len(found.modules)} modules: {text}")
    state = "all as in the base" if not found.foreign else f"{found.foreign} of them not as in the base"
    yield words(f"{found.untouched} other tensors: {state}")
    if found.effect_kept is not None:
        kept = f"{100 * found.effect_kept:.2f} %"
        yield words(f"a right merge in {found.merged_dtype} keeps {kept} of the change, by energy")
    speed = found.read / max(found.seconds, 1e-9) / 2**20
    yield words(f"{found.read / 2**20:,.0f} MiB compared in {found.seconds:.1f} s ({speed:,.0f} MiB/s)", style="dim")


def _outputs(found: Effect) -> Iterable[RenderableType]:
    yield words(f"outputs on the unmerged adapter's own answers, {found.merged.engine}, {found.dtype}", style="bold")
    table = columns_of(
        "prompt", "tokens", "top-1", "first other token", "KL merged", "KL base", "logprob error", "survives"
    )
    run = found.unmerged.run
    texts = [prompt.text for prompt in run.spec.prompts] if run else []
    for prompt in found.prompts:
        first = prompt.first_token
        other = "none" if first is None else f"token {first.token + 1} ({first.unmerged} -> {first.merged})"
        name = " ".join(texts[prompt.prompt].split()) if prompt.prompt < len(texts) else f"{prompt.prompt + 1}"
        add_row(table, name, *_measures(prompt, other))
    add_row(table, "all", *_measures(found, ""))
    yield table
    if found.tokens < THIN:
        more = "prompts like those of the training say more (--prompt, --chat)"
        yield words(f"note: {found.tokens} answer tokens are few: {more}", style="bold yellow")
    if found.first_module is not None:
        first_module = found.first_module
        yield words(
            f"merged and unmerged part first at {name_modules([first_module.key[0]])}: prompt "
            f"{first_module.prompt + 1}, position {first_module.position + 1}, error {first_module.error:.1e} "
            f"(tolerance {found.tolerance:.1e})",
            style="bold red",
        )
    elif found.worst_module is not None:
        worst = found.worst_module
        yield words(
            f"no module's output parts beyond {found.tolerance:.1e}; worst {name_modules([worst.key[0]])}: "
            f"{worst.error:.1e}"
        )
    for note in found.notes:
        yield words(f"note: {note}", style="bold yellow")


def _measures(found: Measures, other: str) -> tuple[str, ...]:
    return (
        str(found.tokens),
        _percent(found.top1),
        other,
        _small(found.kl_merged),
        _small(found.kl_base),
        _small(found.logprob_error),
        _percent(found.survives),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _diagnostic(found: Diagnostic) -> Iterable[RenderableType]:
    yield words(f"{found.code} {found.name}: {found.message}", style=SEVERE[found.severity])
    yield words(f"  {found.hint}", style="cyan")


def _verdict(found: Parity) -> RenderableType:
    weights, outputs = found.weights, found.outputs
    if found.verdict != "verified":
        gravest = sorted(found.diagnostics, key=lambda diagnostic: diagnostic.severity != "error")
        about = gravest[0].message if gravest else "the adapter has no module that could be compared"
        return words(f"{found.verdict}: {about}", style="bold red")
    text = f"verified: {len(weights.modules)} of {len(weights.modules)} modules merged rightly"
    if weights.effect_kept is not None:
        text += f", {100 * weights.effect_kept:.1f} % of the change kept"
    if outputs is not None and outputs.survives is not None:
        text += f", {100 * outputs.survives:.2f} % of the effect survives"
    return words(text, style="bold green")
