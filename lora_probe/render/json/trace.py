"""JSON of `trace` and `show`: a recorded run.

In: a `Recording`. Out: a plain dictionary, and its parts that `compare` and the text format use as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lora_probe.errors import ProbeError
from lora_probe.ledger import as_json as ledger_json
from lora_probe.ledger import headline
from lora_probe.precision import finite
from lora_probe.recording.rows import latest
from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.json.error import message_json
from lora_probe.rules import as_json as diagnostic_json
from lora_probe.rules import diagnose
from lora_probe.rules.diagnostics import of_requests

if TYPE_CHECKING:
    from lora_probe.recording import RequestFinding, RequestRecord, Trace
    from lora_probe.render.results import Recording


NO_LOAD = ProbeError("no adapter was loaded while this trace was recorded")
"""The error of a trace without a ledger."""


def recording_json(recording: Recording) -> dict[str, Any]:
    """The whole run; every step of the load timeline is in it, whatever `--events` is."""
    return trace_json(recording.trace)


def trace_json(trace: Trace) -> dict[str, Any]:
    """Ledger, diagnostics, requests, contributions and events."""
    ledgers = [ledger for _, ledger in trace.loads]
    return {
        "schema_version": SCHEMA_VERSION,
        "trace": str(trace.path),
        "engine": trace.engine,
        "complete": trace.complete,
        "unclosed": list(trace.unclosed),
        "run": msgspec.to_builtins(trace.run),
        "processes": [msgspec.to_builtins(process.process) for process in trace.processes],
        "headline": headline(ledgers[0]) if ledgers else None,
        "ledger": {trace.engine: ledger_json(ledgers[0])} if ledgers else {},
        "loads": [
            {
                "load": msgspec.to_builtins(load),
                "ledger": ledger_json(ledger),
                "headline": headline(ledger),
                "request_findings": [finding_json(f) for f in trace.request_findings if f.load == load.load],
            }
            for load, ledger in trace.loads
        ],
        "diagnostics": [
            *(diagnostic_json(diagnostic) for ledger in ledgers for diagnostic in diagnose(ledger)),
            *(diagnostic_json(of_requests(f.code, f.message, trace.engine)) for f in trace.request_findings),
        ],
        "requests": requests_json(trace),
        "modules": contributions_json(trace),
        "events": [msgspec.to_builtins(event) for event in trace.events],
        **({} if ledgers else {"error": message_json(NO_LOAD)}),
    }


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


def contributions_json(trace: Trace) -> list[dict[str, Any]]:
    """What each module contributed, over all rows of the adapter. A row that was computed again counts once."""
    rows = trace.rows
    if rows is None:
        return []
    with_adapter = (rows.load >= 0) & latest(rows)
    entries = []
    for number, (module, parameter, expert) in enumerate(rows.modules):
        delta, base = rows.delta_norm[with_adapter, number], rows.base_norm[with_adapter, number]
        norms = [float(np.sqrt(np.nansum(np.square(column, dtype=np.float64)))) for column in (delta, base)]
        entries.append(
            {
                "module": module,
                "parameter": parameter,
                "expert": expert,
                "rows": int(np.isfinite(delta).sum()),
                "delta_norm": finite(norms[0]),
                "base_norm": finite(norms[1]),
                "strength": finite(norms[0] / norms[1]) if norms[1] else None,
            }
        )
    return entries
