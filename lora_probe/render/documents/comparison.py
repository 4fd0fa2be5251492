"""The document of `compare`: where two runs part, and why.

In: a `Comparison`, or those of several adapters. Out: a `Document`.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_probe.comparison import Cause, Comparison, Comparisons
from lora_probe.comparison.compared import SIDES
from lora_probe.comparison.modules import PARTS
from lora_probe.errors import command_line
from lora_probe.names import Key
from lora_probe.render.document import Document, Finding, Lines, Section, Table, heats
from lora_probe.render.documents.parts import fate_heats, page_of
from lora_probe.render.text.compare import answered, cells_of, errors, first_divergence, result_of, run_in, side_of
from lora_probe.render.towers import Cell, number
from lora_probe.render.verdicts import of_comparison, of_comparisons


def comparison(result: Comparison) -> Document:
    """One comparison."""
    verdict = of_comparison(result)
    paths = tuple(str(trace.path) for trace in result.traces)
    judged = f"{result.tolerance:.1e} ({result.dtype or 'no dtype recorded'}), {result.rows} rows"
    facts = ("reference", paths[0]), ("candidate", paths[1]), ("tolerance", judged)
    findings = tuple(map(_cause, result.causes))
    title = command_line(["compare", *paths])
    return Document(title, verdict.text, verdict.tone, findings, facts, tuple(_sections(result)))


def comparisons(result: Comparisons) -> Document:
    """That of each adapter, under its name."""
    verdict = of_comparisons(result)
    findings: list[Finding] = []
    sections: list[Section] = [Lines("Notes", result.notes)] if result.notes else []
    for name, of_adapter in result.by_adapter.items():
        findings += map(_cause, of_adapter.causes)
        sections.append(Lines(f"Adapter {name}", (of_comparison(of_adapter).text,)))
        sections += _sections(of_adapter)
    return Document("compare", verdict.text, verdict.tone, tuple(findings), (), tuple(sections))


def _cause(cause: Cause) -> Finding:
    words = cause.code, f"{cause.name}{side_of(cause)}", "error", cause.message, cause.hint
    return Finding(*words, cause.evidence, page_of(cause.code))


def _sections(result: Comparison) -> Iterator[Section]:
    if result.bisection is not None:
        yield Lines("Bisection", (result.bisection.text,))
    runs = tuple(
        (side, str(trace.path), run_in(trace), result_of(trace, ledger))
        for side, trace, ledger in zip(SIDES, result.traces, result.ledgers, strict=True)
    )
    bad = frozenset(number for number, ledger in enumerate(result.ledgers) if not ledger.healthy)
    yield Table("Both runs", ("run", "trace", "engine", "result"), runs, bad)
    yield from fate_heats([(side, ledger) for side, ledger in zip(SIDES, result.ledgers, strict=True)])
    if result.modules:
        about = "Relative to the reference's contribution. error = weights + routing + upstream, within arithmetic."
        yield from heats("Difference of each module", _measures(result), about)
    if different := [diff for diff in result.modules if diff.status != "ok"]:
        rows = tuple((result.name(diff.key), *cells_of(diff)) for diff in different)
        yield Table("Modules that differ", ("module", *PARTS, "error"), rows)
    first = [f"first divergence: {first_divergence(result)}"] if result.first is not None else []
    if lines := (*first, *answered(result)):
        yield Lines("Answers", tuple(lines))
    if result.notes:
        yield Lines("Notes", result.notes)


def _measures(result: Comparison) -> dict[str, dict[Key, Cell]]:
    measures = {"error": errors(result)}
    for part in PARTS:
        values = {diff.key: getattr(diff.parts, part) for diff in result.modules if diff.parts is not None}
        measures[part] = {key: number(value, 2) for key, value in values.items() if value is not None}
    for place, side in enumerate(SIDES):
        cells = {diff.key: number(diff.strength[place]) for diff in result.modules}
        measures[f"contribution in the {side}"] = cells
    return measures
