"""JSON of `compare`: two traces.

In: a `Comparison`. Out: a plain dictionary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_probe.ledger import as_json as ledger_json
from lora_probe.precision import finite
from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.json.trace import base_answers, request_json
from lora_probe.rules import as_json as diagnostic_json
from lora_probe.rules import diagnose

if TYPE_CHECKING:
    from lora_probe.comparison import Comparison, Comparisons
    from lora_probe.comparison.adapters import AdapterDifference
    from lora_probe.comparison.placed_weights import WeightDifference
    from lora_probe.recording import Trace


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Verdict, first divergence, both ledgers, requests and modules. Two traces of one engine have their ledgers under
    `ENGINE:reference` and `ENGINE:candidate`."""
    traces, ledgers = (comparison.reference, comparison.candidate), comparison.ledgers
    bases = [base_answers(trace) for trace in traces]
    names = [trace.engine for trace in traces]
    if names[0] == names[1]:
        names = [f"{name}:{side}" for name, side in zip(names, ("reference", "candidate"), strict=True)]
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": comparison.verdict,
        "reference": str(comparison.reference.path),
        "candidate": str(comparison.candidate.path),
        "runs": dict(zip(("reference", "candidate"), map(_run, traces), strict=True)),
        "adapters": [_adapter_difference(difference) for difference in comparison.adapters],
        "weights": [_weight_difference(difference) for difference in comparison.weights],
        "dtype": comparison.dtype,
        "tolerance": comparison.tolerance,
        "rows": comparison.rows,
        "first_divergence": _first_divergence(comparison),
        "ledger": {name: ledger_json(ledger) for name, ledger in zip(names, ledgers, strict=True)},
        "diagnostics": [diagnostic_json(diagnostic) for ledger in ledgers for diagnostic in diagnose(ledger)],
        "requests": [
            {
                **request_json(comparison.reference, request.reference, bases[0]),
                "candidate": request_json(comparison.candidate, request.candidate, bases[1]),
                "same_tokens": request.same_tokens,
                "logprob_error": finite(request.logprob_error),
            }
            for request in comparison.requests
        ],
        "modules": [
            {
                "module": diff.module,
                "parameter": diff.key[1],
                "expert": diff.key[2],
                "status": diff.status,
                "error": finite(diff.error),
                "worst_row": finite(diff.worst_row),
                "worst_at": diff.worst_at,
                "exact": diff.exact,
                "strength": [finite(value) for value in diff.strength],
            }
            for diff in comparison.modules
        ],
        "notes": list(comparison.notes),
    }


def comparisons_json(comparisons: Comparisons) -> dict[str, Any]:
    """The verdict over all adapters, and the comparison of each."""
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": comparisons.verdict,
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
        "message": difference.text,
        "factors": None if difference.factors is None else [finite(factor) for factor in difference.factors],
        "meaning": difference.meaning,
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
