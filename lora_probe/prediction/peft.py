"""PEFT: it decides from adapter_config.json which modules are adapted, and finds the tensors by their names.

In: a `Subject` and a row of its ledger. Out: what PEFT makes of it, as `inject_adapter` and `set_peft_model_state_dict`
do (PEFT 0.21).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lora_probe.adapter import Adapter, AdapterModule, adapter_in
from lora_probe.adapter.saved import names_without_pairs
from lora_probe.base import EngineView, Shapes
from lora_probe.ledger import OK, Finding
from lora_probe.names import PREFIX, Key
from lora_probe.prediction.places import name_in_file, place_of, wrappers_of
from lora_probe.prediction.predictor import Predictor, Refusal, expected_shape, no_module, not_known
from lora_probe.rules.lp1_targets import not_targeted
from lora_probe.rules.lp2_names import doubled_prefix, odd_ending, prefix_missing, wrapper_in_name
from lora_probe.rules.lp3_heads import on_whole_module, whole_module
from lora_probe.rules.lp3_names import no_lora_layer_there
from lora_probe.rules.stored import Expected
from lora_probe.rules.subject import Place, Serving, Subject

NAME = "peft"
LAYERS_COPIED = Finding("unknown", message="PEFT copies layers (layer_replication), which is not predicted")
EXPERTS_CONVERTED = Finding("unknown", message="PEFT converts the names of experts on load, which is not predicted")


def shapes_in(views: Mapping[str, EngineView]) -> Shapes | None:
    """The modules that PEFT can adapt. PEFT runs the model of Transformers, so these are the base's own names."""
    view = views.get(NAME)
    if view is None:
        return None
    return {name: module.shape for name, module in view.modules.items() if not module.why_not}


def with_default_targets(adapter: Adapter, views: Mapping[str, EngineView]) -> Adapter:
    """PEFT has default targets by model type, for a config without target_modules."""
    if adapter.config.target_modules is not None or adapter.config.raw.get("target_parameters"):
        return adapter
    view = views.get(NAME)
    targets = view.default_targets if view is not None else ()
    return replace(adapter, config=replace(adapter.config, target_modules=targets or None))


def _resolve(view: EngineView, adapter: Adapter, serving: Serving) -> dict[Key, Place]:
    return {pair.key: _place(view, pair) for pair in adapter.modules}


def _place(view: EngineView, pair: AdapterModule) -> Place:
    """The prefix that `set_peft_model_state_dict` expects, and the modules of fused parameters."""
    stored = name_in_file(pair)
    if not stored.startswith(PREFIX) and not view.renames:
        return Place(None, None, f"its name does not begin with `{PREFIX}`")
    place = place_of(view, view.renamed(stored.removeprefix(PREFIX)))
    if place.name is None or pair.parameter == "weight":
        return place
    # PEFT stores a fused parameter under its module: `experts.base_layer` for the inner one, `experts`.
    name = place.name.removesuffix(".base_layer")
    has_parameter = pair.parameter in view.parameters.get(name, ())
    return Place(name, view.modules.get(name) if has_parameter else None)


def _judge(subject: Subject, row: Expected, place: Place | None) -> tuple[Finding, Finding]:
    """`read` and `placed`: the name as it stands, and whether the config targets the module."""
    assert row.entry is not None
    gone = Finding("absent")
    if (named := _misnamed(row.entry, place)) is not None:
        return named, gone
    targeted = bool(subject.adapter.config.targeted([row.module])) or row.entry.parameter != "weight"
    if place is None:
        return OK, not_known(subject) if targeted else not_targeted(subject.adapter.config, row.module)
    if place.module is None and ".experts." in f"{row.entry.module}." and subject.views[NAME].parameters:
        return EXPERTS_CONVERTED, EXPERTS_CONVERTED
    if place.module is None and subject.adapter.config.raw.get("layer_replication"):
        return LAYERS_COPIED, LAYERS_COPIED
    if place.module is None:
        return no_module(row, subject.views[NAME]), gone
    for tensor in filter(None, (row.entry.a, row.entry.b)):
        if (ending := odd_ending(tensor.name, place.module.kind == "embedding", adapter_in(tensor))) is not None:
            return ending, gone
    if (trained := whole_module(names_without_pairs(subject.adapter.config.raw), row.module)) is not None:
        return OK, on_whole_module(trained)
    if not targeted:
        return OK, not_targeted(subject.adapter.config, row.module)
    # A parameter is adapted whatever kind of module it belongs to.
    adaptable = not place.module.why_not or subject.adapter.config.targets_parameter(f"{row.module}.weight")
    return OK, OK if adaptable else no_lora_layer_there(place.module.why_not)


def _misnamed(pair: AdapterModule, place: Place | None) -> Finding | None:
    """What in a pair's name keeps PEFT from finding it, for any base model."""
    stored = name_in_file(pair)
    named = wrapper_in_name(wrappers_of(pair)) if place is None or place.module is None else None
    named = named or (prefix_missing(stored, PREFIX) if place is None or place.dropped else None)
    return named or doubled_prefix(stored.removeprefix(PREFIX))


def _refuse(subject: Subject, row: Expected, place: Place | None) -> Refusal | None:
    """PEFT copies tensors into its layers, and requires exactly their shape."""
    pair = row.entry
    assert pair is not None
    if place is None:
        # Without a base only the ranks can be compared.
        if row.stored.code in ("LP201", "LP206") and pair.a is not None:
            return row.stored.code, f"size mismatch: {row.stored.message}"
        return None
    fitting = expected_shape(place, pair.embedding)
    if fitting is None or not subject.adapter.config.targeted([row.module]):
        return None
    tall, wide = fitting
    rank = subject.adapter.config.rank_of(row.module)
    of_a, of_b = pair.blocks
    for tensor, wanted in ((pair.a, (rank, wide // of_a)), (pair.b, (tall, rank // of_b))):
        if tensor is not None and tensor.shape != wanted:
            return row.stored.code or "LP301", (
                f"size mismatch for `{tensor.name}`: {list(tensor.shape)} in the file, {list(wanted)} in the model"
            )
    return None


PREDICTOR = Predictor(
    name=NAME,
    title="PEFT",
    judge=_judge,
    refuse=_refuse,
    resolve=_resolve,
    needs=("torch", "transformers", "peft"),
    install="pip install 'lora-probe[peft]'",
    has_flags=False,
)
"""Entry point `peft` of the group `lora_probe.predictors`."""
