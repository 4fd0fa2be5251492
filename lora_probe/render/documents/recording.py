"""The document of `trace`, `show` and `collect`: a recorded run.

In: a `Recording`. Out: a `Document`: what became of each adapter, what each layer contributed, and at which token.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_probe.comparison.recorded import LoadEntry
from lora_probe.comparison.totals import Totals, totals
from lora_probe.errors import command_line
from lora_probe.recording import Trace
from lora_probe.render.document import Document, Finding, Lines, Section, Step, Timeline, heats
from lora_probe.render.documents.parts import fate_heats, finding_of, ledger_sections, lines_of, table_of
from lora_probe.render.documents.tokens import token_heats
from lora_probe.render.results import Recording
from lora_probe.render.text.adapters import contributions
from lora_probe.render.text.answers import answers_table
from lora_probe.render.text.requests import requests_rows
from lora_probe.render.text.timeline import STEPS, duration, story
from lora_probe.render.text.trace import facts_of, state, steps
from lora_probe.render.verdicts import of_recording
from lora_probe.rules import diagnose
from lora_probe.rules.diagnostics import of_requests

MOST_LOADS = 8
"""Adapters whose modules are shown, the first ones."""


def recording(result: Recording, asked: bool = True) -> Document:
    """The run, or what the options select of it. Unless `asked`, nothing in it is from a prompt, an answer or a log."""
    trace, verdict = result.trace, of_recording(result)
    shown = [adapter.newest for adapter in result.adapters[:MOST_LOADS]]
    measured = totals(trace, [entry.number for entry in shown if entry.used])
    sections: list[Section] = [*lines_of("State of the recording", state(trace))]
    for entry in shown:
        sections += _of_load(result, entry, measured, asked)
    if len(result.adapters) > len(shown):
        more = f"{len(result.adapters) - len(shown)} more adapters; --adapter NAME shows one"
        sections.append(Lines("More adapters", (more,)))
    sections += token_heats(trace) if asked else ()
    if trace.requests and result.whole and asked:
        sections.append(table_of("Answers", answers_table(trace)))
    if result.requests and asked:
        sections.append(table_of("Requests", requests_rows(result, measured)))
    sections += _timeline(result)
    findings = tuple(finding for entry in shown for finding in _findings(trace, entry))
    facts = tuple(facts_of(trace))
    return Document(
        command_line(["show", str(trace.path)]), verdict.text, verdict.tone, findings, facts, tuple(sections)
    )


def _of_load(result: Recording, entry: LoadEntry, measured: Totals, asked: bool) -> Iterator[Section]:
    """The stations of the modules of one load, and their contributions."""
    name = f" of {entry.load.name} (load {entry.number})" if len(result.adapters) > 1 else ""
    yield from ledger_sections(entry.ledger, f"Stations of the modules{name}")
    yield from fate_heats([(entry.ledger.engine, entry.ledger)])
    if cells := contributions(entry, measured):
        about = "‖s·x·A·B‖ / ‖base output‖, over all rows of the load."
        yield from heats(f"Contribution of each module{name}", {"contribution": cells}, about)
    if entry.load.said and not entry.sound and asked:
        yield Lines(f"Log of {result.trace.engine} while it loaded the adapter", tuple(entry.load.said))


def _findings(trace: Trace, entry: LoadEntry) -> Iterator[Finding]:
    if entry.outcome is not None and entry.outcome.code:
        yield finding_of(of_requests(entry.outcome.code, entry.outcome.message, trace.engine))
    for finding in entry.findings:
        yield finding_of(of_requests(finding.code, finding.message, trace.engine))
    for diagnostic in diagnose(entry.ledger):
        yield finding_of(diagnostic)


def _timeline(result: Recording) -> Iterator[Timeline]:
    lines = list(story(steps(result), result.events))[: None if result.events else STEPS]
    longest = max((line.seconds or 0.0 for line in lines), default=0.0) or 1.0
    told = tuple(
        Step(f"{line.at:.3f} s", line.stage, line.text, duration(line.seconds), (line.seconds or 0.0) / longest)
        for line in lines
    )
    if told:
        yield Timeline("Loading", told)
