"""`compare` as text: two traces.

In: a `Comparison`. Out: rich renderables: both headlines, relative errors, tokens, first divergence, verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from lora_probe.ledger import headline
from lora_probe.names import Key, Universe, name_modules, path_of
from lora_probe.render.cells import assemble, paragraphs, words
from lora_probe.render.tables import grid

if TYPE_CHECKING:
    from lora_probe.comparison import Comparison


def comparison(result: Comparison) -> RenderableType:
    """The whole comparison."""
    parts: list[RenderableType] = []
    traces = {"reference": result.reference, "candidate": result.candidate}
    for (side, trace), ledger in zip(traces.items(), result.ledgers, strict=True):
        style = "green" if ledger.healthy else "bold red"
        parts.append(assemble((f"{side} ", "bold"), f"{trace.path} ({trace.engine}): ", (headline(ledger), style)))
    parts += [words(f"note: {note}", style="bold yellow") for note in result.notes]
    parts.append(words(""))
    if result.modules:
        parts += [_errors(result), *_lower_bounds(result), words("")]
    if result.requests:
        parts.append(_tokens(result))
    return Group(*parts, _first_divergence(result), _verdict(result))


def _errors(result: Comparison) -> RenderableType:
    title = (
        f"relative error of s·x·A·B, {result.candidate.engine} against {result.reference.engine}, "
        f"{result.rows} rows; tolerance {result.tolerance:.1e} ({result.dtype or 'no dtype recorded'})"
    )
    cells = {
        diff.key: (diff.error, f"{diff.error:.1e}" + ("" if diff.status == "ok" else "!"))
        if diff.error is not None
        else (None, diff.status)
        for diff in result.modules
    }
    return grid(title, cells)


def _lower_bounds(result: Comparison) -> Iterable[RenderableType]:
    if any(not diff.exact for diff in result.modules if diff.error is not None):
        yield words(
            "some errors are lower bounds from norms: the two runs have different B, or did not keep shrink",
            style="dim",
        )


def _tokens(result: Comparison) -> RenderableType:
    lines = []
    for request in result.requests:
        counts = len(request.reference.output_ids), len(request.candidate.output_ids)
        text = f"all {counts[0]} answer tokens are the same"
        if not request.equal:
            text = f"the answers differ from token {request.same_tokens + 1} (of {counts[0]} and {counts[1]})"
        elif request.logprob_error is not None:
            text += f", largest logprob difference {request.logprob_error:.1e}"
        lines.append(f"prompt {request.prompt + 1}: {text}")
    return paragraphs("\n".join(lines))


def _first_divergence(result: Comparison) -> RenderableType:
    if result.first is None:
        return words("no row of any module exceeds the tolerance" if result.rows else "no rows were compared")
    first = result.first
    token = f"answer token {first.token + 1}" if first.token >= 0 else f"prompt token {first.position + 1}"
    where = f"{_name(result, first.key)}, prompt {first.prompt + 1}, {token}"
    return words(f"first divergence: {where}: error {first.error:.1e}", style="bold red")


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
    if different:
        return f"{different} of {len(result.modules)} modules"
    if any(not ledger.healthy for ledger in result.ledgers):
        return "in their ledgers"
    return "in their answers"


def _name(result: Comparison, key: Key) -> str:
    return name_modules([path_of(key)], Universe(tuple(path_of(diff.key) for diff in result.modules)))
