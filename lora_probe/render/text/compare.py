"""`compare` as text: two traces.

In: a `Comparison`. Out: rich renderables: both headlines, relative errors, tokens, first divergence, verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from lora_probe.ledger import headline
from lora_probe.names import Key, Universe, in_words, name_modules, path_of
from lora_probe.render.cells import assemble, paragraphs, words
from lora_probe.render.tables import grid

if TYPE_CHECKING:
    from lora_probe.comparison import Comparison, Comparisons
    from lora_probe.comparison.joined import RequestDiff
    from lora_probe.recording import Trace


def comparison(result: Comparison) -> RenderableType:
    """The whole comparison."""
    parts: list[RenderableType] = []
    traces = {"reference": result.reference, "candidate": result.candidate}
    for (side, trace), ledger in zip(traces.items(), result.ledgers, strict=True):
        style = "green" if ledger.healthy else "bold red"
        parts.append(assemble((f"{side} ", "bold"), f"{trace.path} ({_run_in(trace)}): ", (headline(ledger), style)))
    parts += [words(f"note: {note}", style="bold yellow") for note in result.notes]
    parts += [words(f"cause: {weights.text}", style="bold red") for weights in result.weights]
    parts.append(words(""))
    if result.modules:
        parts += [_errors(result), *_estimates(result), words("")]
    if result.requests:
        parts.append(_tokens(result))
    return Group(*parts, _first_divergence(result), _verdict(result))


def comparisons(result: Comparisons) -> RenderableType:
    """Each adapter's comparison under its name, and the verdict over all of them."""
    parts: list[RenderableType] = []
    for name, of_adapter in result.by_adapter.items():
        parts += [assemble(("adapter ", "bold"), name), comparison(of_adapter), words("")]
    parts += [words(f"note: {note}", style="bold yellow") for note in result.notes]
    names: dict[str, list[str]] = {}
    for name, of_adapter in result.by_adapter.items():
        names.setdefault(of_adapter.verdict, []).append(name)
    clauses = {"agree": "agree on", "differ": "differ in", "undecided": "are undecided on"}
    text = ", ".join(f"{clause} {in_words(names[verdict])}" for verdict, clause in clauses.items() if verdict in names)
    verdict = f"the traces {text}"
    if result.notes and result.verdict == "undecided":
        verdict = f"undecided: not every adapter has a counterpart; {verdict}"
    return Group(*parts, words(verdict, style="bold green" if result.verdict == "agree" else "bold red"))


def _run_in(trace: Trace) -> str:
    """The engine, its dtypes and its device: `vllm, bfloat16 on cuda`."""
    parts: dict[str, None] = {}
    for worker in trace.workers:
        process = worker.process
        adapter = f", adapter in {process.lora_dtype}" if process.lora_dtype not in ("", process.dtype) else ""
        parts.setdefault(f"{process.dtype or 'no dtype recorded'} on {process.device}{adapter}")
    return ", ".join([trace.engine, *parts])


def _errors(result: Comparison) -> RenderableType:
    dtypes = {worker.process.dtype for trace in (result.reference, result.candidate) for worker in trace.workers}
    coarser = ", the coarser dtype" if result.dtype and len(dtypes) > 1 else ""
    title = (
        f"relative error of s·x·A·B, {result.candidate.engine} against {result.reference.engine}, "
        f"{result.rows} rows; tolerance {result.tolerance:.1e} ({result.dtype or 'no dtype recorded'}{coarser})"
    )
    cells = {
        diff.key: (diff.error, f"{diff.error:.1e}" + ("" if diff.status == "ok" else "!"))
        if diff.error is not None
        else (None, diff.status)
        for diff in result.modules
    }
    return grid(title, cells)


def _estimates(result: Comparison) -> Iterable[RenderableType]:
    if result.estimated:
        yield words(f"some errors are estimated from norms, because {result.estimated}", style="dim")


def _tokens(result: Comparison) -> RenderableType:
    return paragraphs("\n".join(f"prompt {diff.prompt + 1}: {_answers(result, diff)}" for diff in result.requests))


def _answers(result: Comparison, diff: RequestDiff) -> str:
    """How far two answers are the same. Forced tokens are always the same, so they are counted apart."""
    one, two = len(diff.reference.output_ids), len(diff.candidate.output_ids)
    forced = max(result.reference.forced(diff.reference), result.candidate.forced(diff.candidate))
    by_follow = f"{forced} forced by --follow" if forced else ""
    if diff.equal:
        text = f"all {one} answer tokens are the same" + (f" ({by_follow})" if forced else "")
        error = diff.logprob_error
        return text if error is None else f"{text}, largest logprob difference {error:.1e}"
    lengths = f"both have {one} tokens" if one == two else f"they have {one} and {two} tokens"
    lengths += f", {by_follow}" if forced else ""
    if diff.same_tokens == min(one, two):
        ends, goes_on = ("reference", "candidate") if one < two else ("candidate", "reference")
        return f"the {ends}'s answer ends first, the {goes_on}'s goes on ({lengths})"
    return f"the answers differ from token {diff.same_tokens + 1} on ({lengths})"


def _first_divergence(result: Comparison) -> RenderableType:
    if result.first is None:
        return words("no row of any module exceeds the tolerance" if result.rows else "no rows were compared")
    first = result.first
    token = f"answer token {first.token + 1}" if first.token >= 0 else f"prompt token {first.position + 1}"
    where = f"{_name(result, first.key)}, prompt {first.prompt + 1}, {token}"
    whole = next((diff.error for diff in result.modules if diff.key == first.key), None)
    all_rows = "" if whole is None else f" in this row, {whole:.1e} over all rows"
    return words(f"first divergence: {where}: error {first.error:.1e}{all_rows}", style="bold red")


def _verdict(result: Comparison) -> RenderableType:
    worst = result.worst
    about = f"; worst module {_name(result, worst.key)}: {worst.error:.1e}" if worst and worst.error is not None else ""
    text = {
        "agree": f"the traces agree on {len(result.modules)} modules{about}",
        "differ": f"the traces differ: {_what_differs(result)}{about}",
        "undecided": f"undecided: not everything could be compared{about}",
    }[result.verdict]
    return words(text, style="bold green" if result.verdict == "agree" else "bold red")


def _what_differs(result: Comparison) -> str:
    different = sum(diff.status != "ok" for diff in result.modules)
    total = len(result.modules)
    if result.adapters:
        exceeding = f"{different} of {total} modules exceed" if different else "no module exceeds"
        return f"the runs loaded different adapters; {exceeding} the tolerance"
    if result.weights:
        return f"the weights in the engines; {different} of {total} modules exceed the tolerance"
    if different:
        return f"{different} of {total} modules"
    if any(not ledger.healthy for ledger in result.ledgers):
        return "in their ledgers"
    return "in their answers"


def _name(result: Comparison, key: Key) -> str:
    return name_modules([path_of(key)], Universe(tuple(path_of(diff.key) for diff in result.modules)))
