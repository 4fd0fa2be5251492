"""`compare` in Markdown, to paste into an issue.

In: a `Comparison`. Out: Markdown: the verdict, its causes with their evidence, both runs, the modules that differ, and
the answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_probe.comparison.compared import SIDES
from lora_probe.comparison.modules import PARTS
from lora_probe.render.cells import one_line
from lora_probe.render.text.compare import (
    MOST_MODULES,
    answered,
    cells_of,
    first_divergence,
    result_of,
    run_in,
    side_of,
)
from lora_probe.render.verdicts import of_comparison

if TYPE_CHECKING:
    from lora_probe.comparison import Cause, Comparison, Comparisons


def comparison(result: Comparison) -> str:
    """The whole comparison."""
    return "\n".join(_lines(result, "##")) + "\n"


def comparisons(result: Comparisons) -> str:
    """That of each adapter, under its name."""
    lines = [f"## {result.verdict}", ""]
    for name, of_adapter in result.by_adapter.items():
        lines += [f"## Adapter {_code(name)}", "", *_lines(of_adapter, "###"), ""]
    return "\n".join([*lines, *(f"- {_plain(note)}" for note in result.notes)]) + "\n"


def _lines(result: Comparison, heading: str) -> Iterator[str]:
    yield f"{heading} {_plain(of_comparison(result).text)}"
    yield ""
    for cause in result.causes:
        yield from _cause(cause)
    if result.bisection is not None:
        yield from (f"**Bisection**: {_plain(result.bisection.text)}", "")
    yield from ("| run | engine | result |", "|---|---|---|")
    for side, trace, ledger in zip(SIDES, result.traces, result.ledgers, strict=True):
        yield f"| {side}: {_code(str(trace.path))} | {_plain(run_in(trace))} | {_plain(result_of(trace, ledger))} |"
    yield ""
    different = [diff for diff in result.modules if diff.status != "ok"]
    if different:
        yield f"| module | {' | '.join(PARTS)} | error |"
        yield "|---" + "|---:" * (len(PARTS) + 1) + "|"
        for diff in different[:MOST_MODULES]:
            yield f"| {_plain(result.name(diff.key))} | {' | '.join(cells_of(diff))} |"
        if len(different) > MOST_MODULES:
            yield f"\nand {len(different) - MOST_MODULES} more modules"
        yield ""
    judged = f"tolerance {result.tolerance:.1e} ({result.dtype or 'no dtype recorded'}), {result.rows} rows"
    first = [f"first divergence: {first_divergence(result)}"] if result.first is not None else []
    yield from (f"- {_plain(line)}" for line in (*first, judged, *result.notes, *answered(result)))


def _cause(cause: Cause) -> Iterator[str]:
    yield f"**{cause.code} {cause.name}**{side_of(cause)}: {_plain(cause.message)}"
    yield ""
    yield from (f"- {_plain(line)}" for line in cause.evidence)
    yield f"- hint: {_plain(cause.hint)}"
    yield ""


def _plain(text: str) -> str:
    """Text of a trace as text: no markup of its own, and nothing that ends a cell of a table. Code stays code."""
    text = one_line(text)
    parts = text.split("`")
    escaped = [part if number % 2 else _escaped(part) for number, part in enumerate(parts)]
    return "`".join(escaped) if len(parts) % 2 else _escaped(text.replace("`", "'"))


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in r"\*_[]<>|#" else letter for letter in text)


def _code(text: str) -> str:
    plain = one_line(text).replace("`", "'").replace("|", "/")
    return f"`{plain}`"
