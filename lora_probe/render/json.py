"""JSON for programs: the same things in the same shape from every command, with `schema_version`.

In: an adapter, a trace, a comparison, a merge, rules. Out: plain dictionaries. Fields may be added, none is taken away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.spectrum import Spectrum
from lora_probe.ledger import as_json as ledger_json
from lora_probe.ledger import headline
from lora_probe.names import layer_of, projection_of
from lora_probe.rules import Rule, diagnose
from lora_probe.rules import as_json as diagnostic_json

if TYPE_CHECKING:
    # What only `parity` and traces need takes half of the start of `inspect`.
    from lora_probe.comparison import Comparison
    from lora_probe.files.weights import TensorHeader
    from lora_probe.merging.parity import Parity
    from lora_probe.recording import RequestRecord, Trace

SCHEMA_VERSION = 1


def inspect_json(adapter: Adapter, spectra: Mapping[str, Spectrum | None] | None) -> dict[str, Any]:
    """What `inspect` shows: every module, and every tensor of the file exactly once."""
    config = adapter.config
    return {
        "schema_version": SCHEMA_VERSION,
        "adapter": str(adapter.path),
        "notes": list(adapter.notes),
        "base_model": config.base_model,
        "peft_version": config.peft_version,
        "variants": list(config.variants),
        "rank": config.rank,
        "alpha": config.alpha,
        "scaling": config.scaling,
        "dtypes": list(adapter.dtypes),
        "bytes": adapter.weights.size,
        "parameters": adapter.parameters,
        "modules": [_module(module, spectra) for module in adapter.modules],
        "others": [
            {**_tensor(other.tensor), "what": other.what, "understood": other.understood} for other in adapter.others
        ],
        "files": list(adapter.files),
    }


def _module(module: AdapterModule, spectra: Mapping[str, Spectrum | None] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "module": module.module,
        "parameter": module.parameter,
        "expert": module.expert,
        "stored_as": module.stored_as,
        "layer": layer_of(module.module),
        "projection": projection_of(module.module),
        "rank": module.rank,
        "scaling": module.scaling,
        "tensors": [_tensor(tensor) for tensor in module.tensors],
    }
    if spectra is not None:
        spectrum = spectra.get(module.stored_as)
        found["norm"] = _number(spectrum.norm) if spectrum else None
        found["effective_rank"] = _number(spectrum.effective_rank) if spectrum else None
        found["singular_values"] = [_number(float(v)) for v in spectrum.singular] if spectrum else None
    return found


def _tensor(tensor: TensorHeader) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _number(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if value is not None and np.isfinite(value) else None


def trace_json(trace: Trace) -> dict[str, Any]:
    """What `trace` and `show` print of a recorded run."""
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
            {"load": msgspec.to_builtins(load), "ledger": ledger_json(ledger), "headline": headline(ledger)}
            for load, ledger in trace.loads
        ],
        "diagnostics": [diagnostic_json(d) for ledger in ledgers for d in diagnose(ledger)],
        "requests": requests_json(trace),
        "modules": contributions_json(trace),
        "events": [msgspec.to_builtins(event) for event in trace.events],
    }


def requests_json(trace: Trace) -> list[dict[str, Any]]:
    """One entry for each answer of the adapter, with the base's answer to the same prompt."""
    base = _base_texts(trace)
    asked = [request for request in trace.requests if request.adapter is not None] or list(trace.requests)
    return [_request(request, base) for request in asked]


def _base_texts(trace: Trace) -> dict[int, str]:
    return {request.prompt: request.text for request in trace.requests if request.adapter is None}


def _request(request: RequestRecord, base: Mapping[int, str]) -> dict[str, Any]:
    return {
        "id": request.id,
        "adapter": request.adapter,
        "prompt_ids": request.prompt_ids,
        "output_ids": request.output_ids,
        "text": request.text,
        "base_text": base.get(request.prompt),
    }


def contributions_json(trace: Trace) -> list[dict[str, Any]]:
    """What each module contributed, over all rows of the adapter."""
    rows = trace.rows
    if rows is None:
        return []
    mine = rows.load >= 0
    found = []
    for number, (module, parameter, expert) in enumerate(rows.modules):
        delta, base = rows.delta_norm[mine, number], rows.base_norm[mine, number]
        norms = [float(np.sqrt(np.nansum(np.square(column, dtype=np.float64)))) for column in (delta, base)]
        found.append(
            {
                "module": module,
                "parameter": parameter,
                "expert": expert,
                "rows": int(np.isfinite(delta).sum()),
                "delta_norm": _number(norms[0]),
                "base_norm": _number(norms[1]),
                "strength": _number(norms[0] / norms[1]) if norms[1] else None,
            }
        )
    return found


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """What `compare` found."""
    traces, ledgers = (comparison.reference, comparison.candidate), comparison.ledgers
    names = [trace.engine for trace in traces]
    if names[0] == names[1]:
        names = [f"{name}:{side}" for name, side in zip(names, ("reference", "candidate"), strict=True)]
    first = comparison.first
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": comparison.verdict,
        "reference": str(comparison.reference.path),
        "candidate": str(comparison.candidate.path),
        "dtype": comparison.dtype,
        "tolerance": comparison.tolerance,
        "rows": comparison.rows,
        "first_divergence": None
        if first is None
        else {
            "prompt": first.prompt,
            "position": first.position,
            "module": first.key[0],
            "parameter": first.key[1],
            "expert": first.key[2],
            "error": _number(first.error),
        },
        "ledger": {name: ledger_json(ledger) for name, ledger in zip(names, ledgers, strict=True)},
        "diagnostics": [diagnostic_json(d) for ledger in ledgers for d in diagnose(ledger)],
        "requests": [
            {
                **_request(request.reference, _base_texts(comparison.reference)),
                "candidate": _request(request.candidate, _base_texts(comparison.candidate)),
                "same_tokens": request.same_tokens,
                "logprob_error": _number(request.logprob_error),
            }
            for request in comparison.requests
        ],
        "modules": [
            {
                "module": diff.module,
                "parameter": diff.key[1],
                "expert": diff.key[2],
                "status": diff.status,
                "error": _number(diff.error),
                "worst_row": _number(diff.worst_row),
                "worst_at": diff.worst_at,
                "exact": diff.exact,
                "strength": [_number(value) for value in diff.strength],
            }
            for diff in comparison.modules
        ],
        "notes": list(comparison.notes),
    }


def parity_json(found: Parity) -> dict[str, Any]:
    """What `parity` found. The parts of a fused expert that lie apart are told apart by `tensor`."""
    from lora_probe.comparison.effect import as_json as effect_json

    weights = found.weights
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": found.verdict,
        "adapter": str(weights.adapter),
        "model": str(weights.base),
        "merged": None if found.made else str(weights.merged),
        "dtypes": {"base": weights.base_dtype, "merged": weights.merged_dtype},
        "effect_kept": _number(weights.effect_kept),
        "compared": weights.compared,
        "diagnostics": [diagnostic_json(diagnostic) for diagnostic in found.diagnostics],
        "modules": [
            {
                "module": module.key[0],
                "parameter": module.key[1],
                "expert": module.key[2],
                "tensor": module.tensor,
                "status": module.status,
                "reason": module.findings[0].code if module.findings else None,
                "residual": _number(module.residual),
                "share": _number(module.share),
                "effect_kept": _number(module.effect_kept),
                "scaling": _number(module.scaling),
                "implied_scaling": _number(module.implied_scaling),
                "bit_exact": module.bit_exact,
                "arithmetic": module.arithmetic,
                "by_order_of_sums": module.by_order_of_sums,
            }
            for module in weights.modules
        ],
        "outputs": None if found.outputs is None else {"engine": found.engine, **effect_json(found.outputs)},
        "said": list(found.warnings),
    }


def rules_json(rules: list[Rule]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "rules": [
            {
                "code": rule.code,
                "name": rule.name,
                "station": rule.station,
                "engines": list(rule.engines),
                "severity": rule.severity,
                "hint": rule.hint,
                "page": rule.page,
            }
            for rule in rules
        ],
    }
