"""JSON of `inspect`: an adapter, or one of its modules with its values.

In: an `Inspection` or a `OneModule` module. Out: a plain dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_probe.adapter import AdapterModule
from lora_probe.adapter.spectrum import Spectrum
from lora_probe.names import layer_of, projection_of
from lora_probe.precision import finite
from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.results import Inspection

if TYPE_CHECKING:
    from lora_probe.adapter.one_module import OneModule, TensorValues
    from lora_probe.files.weights import TensorHeader


def inspection_json(inspection: Inspection) -> dict[str, Any]:
    """Every module, and every tensor of the file exactly once."""
    adapter, config = inspection.adapter, inspection.adapter.config
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
        "modules": [_module(module, inspection.spectra) for module in adapter.modules],
        "others": [
            {**_tensor(other.tensor), "what": other.what, "understood": other.understood} for other in adapter.others
        ],
        "files": list(adapter.files),
    }


def module_json(selected: OneModule) -> dict[str, Any]:
    """The output of `inspect --norms` for this module alone, with the norm and a corner of each tensor as `values`.
    Numbers that are not finite are null."""
    module = selected.module
    data = inspection_json(Inspection(selected.adapter, {module.stored_as: selected.spectrum}))
    data["modules"] = [entry for entry in data["modules"] if entry["stored_as"] == module.stored_as]
    data["modules"][0] |= {
        "config_rank": module.config_rank,
        "values": [_values(values) for values in selected.tensors],
    }
    return data


def _module(module: AdapterModule, spectra: Mapping[str, Spectrum | None] | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
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
        entry["norm"] = finite(spectrum.norm) if spectrum else None
        entry["effective_rank"] = finite(spectrum.effective_rank) if spectrum else None
        entry["singular_values"] = [finite(float(value)) for value in spectrum.singular] if spectrum else None
    return entry


def _tensor(tensor: TensorHeader) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _values(values: TensorValues) -> dict[str, Any]:
    corner = values.corner
    return {
        "tensor": values.tensor.name,
        "norm": finite(values.norm),
        "corner": None if corner is None else [[finite(value) for value in row] for row in corner.tolist()],
    }
