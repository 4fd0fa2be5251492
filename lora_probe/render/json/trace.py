"""JSON of `trace` and `show`: a recorded run.

In: a `Recording`. Out: a plain dictionary, and its parts that `compare` and the text format use as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from lora_probe.comparison.recorded import AdapterLoads, LoadEntry
from lora_probe.comparison.totals import Contribution, RequestRows, Totals, own_contributions, totals
from lora_probe.errors import ProbeError
from lora_probe.ledger import as_json as ledger_json
from lora_probe.precision import finite
from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.json.error import message_json
from lora_probe.rules import as_json as diagnostic_json
from lora_probe.rules import diagnose
from lora_probe.rules.diagnostics import of_requests

if TYPE_CHECKING:
    from lora_probe.recording import Outcome, RequestFinding, RequestRecord, Trace
    from lora_probe.render.results import Recording


NO_LOAD = ProbeError("no adapter was loaded while this trace was recorded")
"""The error of a trace without a ledger."""


def recording_json(recording: Recording) -> dict[str, Any]:
    """The whole run, or the adapter and the load that are selected; every step of the load timeline is in it, whatever
    `--events` is. `headline`, `ledger` and `modules` are those of the first load."""
    trace, adapters = recording.trace, recording.adapters
    entries = sorted((entry for adapter in adapters for entry in adapter.loads), key=lambda entry: entry.number)
    ledgers = [entry.ledger for entry in entries]
    measured = totals(trace, [entry.number for entry in entries if entry.used])
    loads = [_load_json(entry, measured) for entry in entries]
    live = trace.running
    return {
        "schema_version": SCHEMA_VERSION,
        "trace": str(trace.path),
        "engine": trace.engine,
        "complete": trace.complete,
        "unclosed": list(trace.unclosed),
        "running": live,
        "dropped_rows": trace.dropped.rows,
        "lost_rows": trace.dropped.lost_rows,
        "other_runs": [str(path) for path in trace.other_runs],
        "run": msgspec.to_builtins(trace.run),
        "processes": [msgspec.to_builtins(process.process) for process in trace.processes],
        "headline": loads[0]["headline"] if loads else None,
        "ledger": {trace.engine: ledger_json(ledgers[0])} if ledgers else {},
        "adapters": [_adapter_json(adapter) for adapter in adapters],
        "loads": loads,
        "diagnostics": [
            *(diagnostic_json(diagnostic) for ledger in ledgers for diagnostic in diagnose(ledger)),
            *(
                diagnostic_json(of_requests(finding.code, finding.message, trace.engine))
                for entry in entries
                for finding in entry.findings
            ),
            *(
                diagnostic_json(of_requests(entry.outcome.code, entry.outcome.message, trace.engine))
                for entry in entries
                if entry.outcome is not None and entry.outcome.code
            ),
        ],
        "requests": requests_json(trace),
        "request_rows": _request_rows_json(recording, measured) if recording.requests else None,
        "modules": loads[0]["modules"] if loads else [],
        "events": [msgspec.to_builtins(event) for event in trace.events],
        **({} if ledgers or live else {"error": message_json(NO_LOAD)}),
    }


def _adapter_json(adapter: AdapterLoads) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "loads": [entry.number for entry in adapter.loads],
        "headline": adapter.newest.headline,
        "healthy": adapter.newest.sound,
    }


def _load_json(entry: LoadEntry, measured: Totals) -> dict[str, Any]:
    contributions = own_contributions(entry.ledger, measured.contributions.get(entry.number, ()))
    return {
        "load": msgspec.to_builtins(entry.load),
        "ledger": ledger_json(entry.ledger),
        "headline": entry.headline,
        "at": entry.at,
        "rows": measured.rows.get(entry.number, 0),
        "graphs": entry.graphs.text if entry.graphs is not None else None,
        "request_findings": [finding_json(finding) for finding in entry.findings],
        "modules": [_contribution_json(contribution) for contribution in contributions],
        "outcome": _outcome_json(entry.outcome) if entry.outcome is not None else None,
    }


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    """What the answers of a server show. Numbers that are not finite become None."""
    measures = "change", "noise", "factor", "error", "effect", "base_error"
    numbers = {name: finite(getattr(outcome, name)) for name in measures if getattr(outcome, name) is not None}
    about = {"outcome": outcome.outcome, "code": outcome.code, "message": outcome.message, "tokens": outcome.tokens}
    return about | dict.fromkeys(measures) | numbers


def _contribution_json(contribution: Contribution) -> dict[str, Any]:
    module, parameter, expert = contribution.key
    return {
        "module": module,
        "parameter": parameter,
        "expert": expert,
        "rows": contribution.rows,
        "delta_norm": finite(contribution.delta_norm),
        "base_norm": finite(contribution.base_norm),
        "strength": contribution.strength,
    }


def shown_requests(recording: Recording, measured: Totals) -> list[RequestRows]:
    """The requests that ran with a selected load; all of them if none is selected."""
    if recording.adapter is None and recording.load is None:
        return list(measured.requests)
    numbers = {entry.number for adapter in recording.adapters for entry in adapter.loads}
    return [request for request in measured.requests if not numbers.isdisjoint(request.loads)]


def _request_rows_json(recording: Recording, measured: Totals) -> list[dict[str, Any]]:
    """The recorded rows of each request. A request of the base model has no loads."""
    names = {load.load: load.name for load, _ in recording.trace.loads}
    entries = []
    for request in shown_requests(recording, measured):
        loads = [load for load in request.loads if load >= 0]
        entries.append(
            {
                "id": request.id,
                "adapters": list(dict.fromkeys(names[load] for load in loads if load in names)),
                "loads": loads,
                "prompt_tokens": request.prompt,
                "rows": request.rows,
                "first": request.first,
                "last": request.last,
                "from_cache": request.cached,
                "cached_loads": request.cached_loads,
                "preemptions": request.preemptions,
                "missing": request.missing,
                "decode": request.decode,
                "repeated": request.repeated,
            }
        )
    return entries


def finding_json(finding: RequestFinding) -> dict[str, Any]:
    """What went wrong for requests: how many rows of them, up to ten ids, and how many requests more."""
    return {
        "code": finding.code,
        "message": finding.message,
        "rows": finding.rows,
        "requests": finding.requests,
        "more": finding.more,
    }


def requests_json(trace: Trace) -> list[dict[str, Any]]:
    """One entry for each answer of the adapter, with the base model's answer to the same prompt."""
    base = base_answers(trace)
    return [request_json(trace, request, base) for request in answers(trace)]


def answers(trace: Trace) -> list[RequestRecord]:
    """The adapter's requests; those of the base model if there are no others."""
    return [request for request in trace.requests if request.adapter is not None] or list(trace.requests)


def base_answers(trace: Trace) -> dict[int, RequestRecord]:
    """The base model's requests by the number of their prompt."""
    return {request.prompt: request for request in trace.requests if request.adapter is None}


def request_json(trace: Trace, request: RequestRecord, bases: Mapping[int, RequestRecord]) -> dict[str, Any]:
    """One answer; `bases` is from `base_answers`. Texts contain the forced tokens at their beginning, generated texts
    do not."""
    base = bases.get(request.prompt)
    return {
        "id": request.id,
        "adapter": request.adapter,
        "prompt_ids": request.prompt_ids,
        "output_ids": request.output_ids,
        "text": request.text,
        "base_text": base.text if base else None,
        "forced_tokens": trace.forced(request),
        "forced_text": request.forced_text,
        "generated_text": request.generated_text,
        "base_generated_text": base.generated_text if base else None,
    }
