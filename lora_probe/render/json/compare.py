"""JSON of `compare`: two traces.

In: a `Comparison`. Out: a plain dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lora_probe.comparison.compared import SIDES
from lora_probe.comparison.modules import PARTS
from lora_probe.ledger import as_json as ledger_json
from lora_probe.names import path_of
from lora_probe.precision import finite
from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.json.trace import base_answers, request_json
from lora_probe.rules import as_json as diagnostic_json
from lora_probe.rules import diagnose

if TYPE_CHECKING:
    from lora_probe.comparison import Cause, Comparison, Comparisons
    from lora_probe.comparison.adapters import AdapterDifference
    from lora_probe.comparison.answers import Agreement, Outputs, Repeats
    from lora_probe.comparison.compared import Bisection
    from lora_probe.comparison.modules import ModuleDiff
    from lora_probe.comparison.weights import WeightDifference
    from lora_probe.recording import Trace


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Verdict, causes, first divergence, modules with the parts of their differences, outputs, and both ledgers."""
    traces = comparison.traces
    bases = [base_answers(trace) for trace in traces]
    listed = [_cause(cause) for cause in comparison.causes]
    own = comparison.largest_own
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": comparison.verdict,
        "cause": listed[0] if listed else None,
        "other_causes": listed[1:],
        "reference": str(comparison.reference.path),
        "candidate": str(comparison.candidate.path),
        "runs": dict(zip(SIDES, map(_run, traces), strict=True)),
        "adapters": [_adapter_difference(difference) for difference in comparison.adapters],
        "weights": [_weight_difference(different) for different in (*comparison.file_weights, *comparison.weights)],
        "dtype": comparison.dtype,
        "tolerance": comparison.tolerance,
        "rows": comparison.rows,
        "first_divergence": _first_divergence(comparison),
        "largest_own_error": None if own is None else _module(own),
        "bisection": None if comparison.bisection is None else _bisection(comparison.bisection),
        "outputs": _outputs(comparison.outputs),
        "repeats": dict(zip(SIDES, map(_repeats, comparison.repeats), strict=True)),
        "ledger": {side: ledger_json(ledger) for side, ledger in zip(SIDES, comparison.ledgers, strict=True)},
        "diagnostics": [
            diagnostic_json(diagnostic) for ledger in comparison.ledgers for diagnostic in diagnose(ledger)
        ],
        "requests": [
            {
                **request_json(comparison.reference, request.reference, bases[0]),
                "candidate": request_json(comparison.candidate, request.candidate, bases[1]),
                "same_tokens": request.same_tokens,
                "logprob_error": finite(request.logprob_error),
            }
            for request in comparison.requests
        ],
        "modules": [_module(diff) for diff in comparison.modules],
        "notes": list(comparison.notes),
    }


def _cause(cause: Cause) -> dict[str, Any]:
    return {
        "code": cause.code,
        "name": cause.name,
        "message": cause.message,
        "side": cause.side or None,
        "modules": [path_of(key) for key in cause.modules],
        "factor": finite(cause.factor),
        "evidence": list(cause.evidence),
        "hint": cause.hint,
    }


def _module(diff: ModuleDiff) -> dict[str, Any]:
    parts = {name: getattr(diff.parts, name, None) for name in PARTS}
    return {
        "module": diff.module,
        "parameter": diff.key[1],
        "expert": diff.key[2],
        "status": diff.status,
        "error": finite(diff.error),
        **{name: finite(value) for name, value in parts.items()},
        "parts_exact": diff.parts is not None and diff.parts.exact,
        "x_error": finite(diff.x_error),
        "worst_row": finite(diff.worst_row),
        "worst_at": diff.worst_at,
        "exact": diff.exact,
        "strength": [finite(value) for value in diff.strength],
    }


def _bisection(bisection: Bisection) -> dict[str, Any]:
    facts = {f.name: getattr(bisection, f.name) for f in fields(bisection)}
    return {"message": bisection.text} | facts | {"modules": list(bisection.modules)}


def _outputs(outputs: Outputs) -> dict[str, Any]:
    first = outputs.first_token
    names = ("prompt", "token", "reference", "candidate")
    return {
        "adapter": _agreement(outputs.adapter),
        "base": _agreement(outputs.base),
        "first_token": None if first is None else {name: getattr(first, name) for name in names},
        "survives": finite(outputs.survives),
    }


def _agreement(agreement: Agreement) -> dict[str, Any]:
    measured = {name: finite(getattr(agreement, name)) for name in ("logprob_error", "kl", "top1")}
    return {"tokens": agreement.tokens, "same_tokens": agreement.same, **measured}


def _repeats(repeats: Mapping[str, Repeats]) -> dict[str, Any]:
    return {
        kind: {
            "requests": of_kind.requests,
            "logprob_error": finite(of_kind.logprob_error),
            "same_tokens": of_kind.same_tokens,
        }
        for kind, of_kind in repeats.items()
    }


def comparisons_json(comparisons: Comparisons) -> dict[str, Any]:
    """The verdict over all adapters with all causes, and the comparison of each."""
    by_adapter = comparisons.by_adapter.items()
    listed = [{"adapter": name} | _cause(cause) for name, comparison in by_adapter for cause in comparison.causes]
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": comparisons.verdict,
        "cause": listed[0] if listed else None,
        "other_causes": listed[1:],
        "reference": str(comparisons.reference.path),
        "candidate": str(comparisons.candidate.path),
        "comparisons": [
            {"adapter": name} | comparison_json(comparison) for name, comparison in comparisons.by_adapter.items()
        ],
        "notes": list(comparisons.notes),
    }


def _run(trace: Trace) -> list[dict[str, str]]:
    """The engine, the dtypes and the device of each worker."""
    names = ("engine", "dtype", "lora_dtype", "device")
    return [{name: getattr(worker.process, name) for name in names} for worker in trace.workers]


def _adapter_difference(difference: AdapterDifference) -> dict[str, Any]:
    return {
        "kind": difference.kind,
        "values": [finite(value) for value in difference.values],
        "same_product": difference.same_product,
        "factors": [finite(factor) for factor in difference.factors],
        "modules": [{"module": key[0], "parameter": key[1], "expert": key[2]} for key in difference.keys],
    }


def _weight_difference(difference: WeightDifference) -> dict[str, Any]:
    return {
        "kind": difference.kind,
        "message": difference.text,
        "factors": None if difference.factors is None else [finite(factor) for factor in difference.factors],
        "meaning": difference.meaning,
        "sources": list(difference.sources),
        "distance": finite(difference.distance),
        "modules": [{"module": key[0], "parameter": key[1], "expert": key[2]} for key in difference.keys],
    }


def _first_divergence(comparison: Comparison) -> dict[str, Any] | None:
    first = comparison.first
    if first is None:
        return None
    return {
        "prompt": first.prompt,
        "position": first.position,
        "module": first.key[0],
        "parameter": first.key[1],
        "expert": first.key[2],
        "error": finite(first.error),
    }
