"""`compare` as text: two traces.

In: a `Comparison`. Out: rich renderables: the verdict and its causes, both headlines, relative errors and their parts,
answers, first divergence.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from lora_probe.comparison.compared import SIDES
from lora_probe.comparison.modules import PARTS
from lora_probe.ledger import Ledger, headline
from lora_probe.names import Key
from lora_probe.render.cells import assemble, paragraphs, words
from lora_probe.render.console import detail
from lora_probe.render.tables import Grid, named_rows
from lora_probe.render.towers import Cell
from lora_probe.render.verdicts import of_comparison, of_comparisons

if TYPE_CHECKING:
    from lora_probe.comparison import Cause, Comparison, Comparisons
    from lora_probe.comparison.joined import RequestDiff
    from lora_probe.comparison.modules import ModuleDiff
    from lora_probe.recording import Trace

MOST_MODULES = 12
"""Modules whose parts are listed."""
_PARTS = "where the difference comes from, relative to the reference's contribution (-: none, ?: unknown)"


def comparison(result: Comparison) -> RenderableType:
    """The verdict with its causes, then what proves it, then the tables."""
    parts: list[RenderableType] = [of_comparison(result).line]
    for number, cause in enumerate(result.causes):
        parts += _cause(cause, number)
    if result.bisection is not None:
        parts.append(words(f"bisection: {result.bisection.text}", style="bold"))
    parts.append(words(""))
    for (side, trace), ledger in zip(zip(SIDES, result.traces, strict=True), result.ledgers, strict=True):
        sound = ledger.healthy or any(outcome.sound for outcome in trace.outcomes.values())
        of_run = result_of(trace, ledger), "green" if sound else "bold red"
        parts.append(assemble((f"{side} ", "bold"), f"{trace.path} ({run_in(trace)}): ", of_run))
    parts += [words(f"note: {note}", style="bold yellow") for note in result.notes]
    parts.append(words(""))
    if result.modules:
        parts += [_errors(result), *_estimates(result), *_parts(result), words("")]
    if lines := answered(result):
        parts.append(paragraphs("\n".join(lines)))
    return Group(*parts, *_first_divergence(result))


def _cause(cause: Cause, number: int) -> Iterable[RenderableType]:
    label = "also" if number else "cause"
    yield words(f"{label} ({cause.code} {cause.name}{side_of(cause)}): {cause.message}", style="bold red")
    yield from (words(f"  {line}") for line in cause.evidence)
    yield words(f"  hint: {cause.hint}")


def result_of(trace: Trace, ledger: Ledger) -> str:
    """What became of the adapter in one run: by its ledger, or by the answers of a server that was asked."""
    outcomes = [f"{outcome.outcome}, by its answers" for outcome in trace.outcomes.values()]
    return "; ".join(outcomes) or headline(ledger)


def side_of(cause: Cause) -> str:
    """In which run a cause is: `, candidate`; empty if the traces do not show it."""
    return ", both runs" if cause.side == "both" else f", {cause.side}" if cause.side else ""


def comparisons(result: Comparisons) -> RenderableType:
    """Each adapter's comparison under its name, and the verdict over all of them."""
    parts: list[RenderableType] = []
    for name, of_adapter in result.by_adapter.items():
        parts += [assemble(("adapter ", "bold"), name), comparison(of_adapter), words("")]
    parts += [words(f"note: {note}", style="bold yellow") for note in result.notes]
    return Group(of_comparisons(result).line, words(""), *parts)


def run_in(trace: Trace) -> str:
    """The engine, its dtypes and its device: `vllm, bfloat16 on cuda`."""
    parts: dict[str, None] = {}
    for worker in trace.workers:
        process = worker.process
        adapter = f", adapter in {process.lora_dtype}" if process.lora_dtype not in ("", process.dtype) else ""
        device = f" on {process.device}" if process.device else ""
        parts.setdefault(f"{process.dtype or 'no dtype recorded'}{device}{adapter}")
    return ", ".join([trace.engine, *parts])


def _errors(result: Comparison) -> RenderableType:
    dtypes = {worker.process.dtype for trace in (result.reference, result.candidate) for worker in trace.workers}
    coarser = ", the coarser dtype" if result.dtype and len(dtypes) > 1 else ""
    title = (
        f"relative error of s·x·A·B, {result.candidate.engine} against {result.reference.engine}, "
        f"{result.rows} rows; tolerance {result.tolerance:.1e} ({result.dtype or 'no dtype recorded'}{coarser})"
    )
    return Grid(title, errors(result))


def errors(result: Comparison) -> dict[Key, Cell]:
    """The relative error of each module, with `~` if it is an estimate and `!` if it exceeds the tolerance."""
    cells = {}
    for diff in result.modules:
        bad = diff.status != "ok"
        text = diff.status if diff.error is None else f"{'' if diff.exact else '~'}{diff.error:.1e}{'!' if bad else ''}"
        cells[diff.key] = Cell(text, diff.error, bad)
    return cells


def _estimates(result: Comparison) -> Iterable[RenderableType]:
    if result.estimated:
        yield words(f"some errors (~) are estimated from norms, because {result.estimated}", style="dim")


def _parts(result: Comparison) -> Iterable[RenderableType]:
    """The parts of the difference of each module that exceeds the tolerance, or that adds to it by itself."""
    shown = [diff for diff in result.modules if diff.parts is not None and diff.status == "differs"]
    if not shown:
        return
    table = named_rows("module", *PARTS, "error")
    listed = shown if detail() == "verbose" else sorted(shown, key=_own, reverse=True)[:MOST_MODULES]
    for diff in listed:
        table.add_row(result.name(diff.key), *cells_of(diff))
    yield words("")
    yield words(_PARTS)
    yield table
    if len(listed) < len(shown):
        yield words(f"{len(shown) - len(listed)} more modules, whose own errors are smaller: -v", style="dim")
    exact = [diff.parts.arithmetic for diff in shown if diff.parts is not None and diff.parts.exact]
    if bounds := [arithmetic for arithmetic in exact if arithmetic is not None]:
        text = "weights, routing and upstream add up to the difference within the engines' arithmetic"
        yield words(f"{text}, {max(bounds):.1e} ({len(bounds)} of {len(shown)} modules)", style="dim")


def _own(diff: ModuleDiff) -> float:
    """What a module adds to the difference by itself."""
    return diff.parts.own if diff.parts is not None else 0.0


def cells_of(diff: ModuleDiff) -> list[str]:
    """The parts of a module's difference, and its error."""
    values = [None if diff.parts is None else getattr(diff.parts, name) for name in PARTS]
    error = "?" if diff.error is None else f"{'' if diff.exact else '~'}{diff.error:.1e}"
    return [*("?" if value is None else f"{value:.1e}" if value else "-" for value in values), error]


def answered(result: Comparison) -> list[str]:
    """The answers of both runs, and how far each run agrees with itself."""
    # A prompt may have been repeated, to see whether a run agrees with itself.
    once = {tuple(diff.reference.prompt_ids): diff for diff in reversed(result.requests)}
    distinct = sorted(once.values(), key=lambda diff: diff.prompt)
    lines = [f"prompt {diff.prompt + 1}: {_answers(result, diff)}" for diff in distinct]
    outputs = result.outputs
    for name, of_kind in (("adapter", outputs.adapter), ("base", outputs.base)):
        if of_kind.kl is not None and of_kind.top1 is not None:
            lines.append(f"{name}: KL {of_kind.kl:.2g} nats per token, same most likely token in {of_kind.top1:.1%}")
        elif name == "base" and of_kind.logprob_error is not None:
            lines.append(f"base: largest logprob difference {of_kind.logprob_error:.1e}")
    if outputs.survives is not None:
        lines.append(f"the candidate keeps {outputs.survives:.2%} of the adapter's effect on the next token")
    for side, repeats in zip(SIDES, result.repeats, strict=True):
        if repeats:
            own = ", ".join(f"{kind} {of_kind.logprob_error:.1e}" for kind, of_kind in repeats.items())
            lines.append(f"{side}, the same request repeated: largest logprob difference {own}")
    return lines


def _answers(result: Comparison, diff: RequestDiff) -> str:
    """How far two answers are the same. Forced tokens are always the same, so they are counted apart."""
    one, two = len(diff.reference.output_ids), len(diff.candidate.output_ids)
    forced = max(result.reference.forced(diff.reference), result.candidate.forced(diff.candidate))
    by_follow = f"{forced} forced to be those of the other run" if forced else ""
    if diff.equal:
        same = "the only answer token is the same" if one == 1 else f"all {one} answer tokens are the same"
        text = same + (f" ({by_follow})" if forced else "")
        error = diff.logprob_error
        return text if error is None else f"{text}, largest logprob difference {error:.1e}"
    lengths = f"both have {one} tokens" if one == two else f"they have {one} and {two} tokens"
    lengths += f", {by_follow}" if forced else ""
    if diff.same_tokens == min(one, two):
        ends, goes_on = ("reference", "candidate") if one < two else ("candidate", "reference")
        return f"the {ends}'s answer ends first, the {goes_on}'s goes on ({lengths})"
    return f"the answers differ from token {diff.same_tokens + 1} on ({lengths})"


def _first_divergence(result: Comparison) -> Iterable[RenderableType]:
    if result.first is not None:
        yield words(f"first divergence: {first_divergence(result)}", style="bold red")
    elif result.rows:
        yield words("no row of any module exceeds the tolerance")


def first_divergence(result: Comparison) -> str:
    """The first row and module beyond the tolerance; empty if there is none."""
    if (first := result.first) is None:
        return ""
    token = f"answer token {first.token + 1}" if first.token >= 0 else f"prompt token {first.position + 1}"
    whole = next((diff.error for diff in result.modules if diff.key == first.key), None)
    all_rows = "" if whole is None else f", {whole:.1e} over all rows"
    where = f"{result.name(first.key)}, prompt {first.prompt + 1}, {token}"
    return f"{where}: {first.error:.1e} of the module's usual contribution{all_rows}"
