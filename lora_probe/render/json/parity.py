"""JSON of `parity`: a merge in the weights and in the outputs.

In: a `Parity`. Out: a plain dictionary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_probe.comparison.effect import as_json as effect_json
from lora_probe.precision import finite
from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.rules import as_json as diagnostic_json

if TYPE_CHECKING:
    from lora_probe.merging.parity import Parity
    from lora_probe.merging.report import ModuleMerge


def parity_json(parity: Parity) -> dict[str, Any]:
    """Verdict, diagnostics, modules and outputs. The parts of a fused expert have the same key; `tensor` tells them
    apart."""
    weights = parity.weights
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": parity.verdict,
        "adapter": str(weights.adapter),
        "model": str(weights.base),
        "merged": None if parity.made else str(weights.merged),
        "dtypes": {"base": weights.base_dtype, "merged": weights.merged_dtype},
        "effect_kept": finite(weights.effect_kept),
        "compared": weights.compared,
        "diagnostics": [diagnostic_json(diagnostic) for diagnostic in parity.diagnostics],
        "modules": [_module(module) for module in weights.modules],
        "outputs": None if parity.outputs is None else {"engine": parity.engine, **effect_json(parity.outputs)},
        "said": list(parity.warnings),
    }


def _module(module: ModuleMerge) -> dict[str, Any]:
    return {
        "module": module.key[0],
        "parameter": module.key[1],
        "expert": module.key[2],
        "tensor": module.tensor,
        "status": module.status,
        "reason": module.findings[0].code if module.findings else None,
        "residual": finite(module.residual),
        "share": finite(module.share),
        "effect_kept": finite(module.effect_kept),
        "scaling": finite(module.scaling),
        "implied_scaling": finite(module.implied_scaling),
        "bit_exact": module.bit_exact,
        "arithmetic": module.arithmetic,
        "by_order_of_sums": module.by_order_of_sums,
    }
