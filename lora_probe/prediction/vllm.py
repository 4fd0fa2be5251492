"""vLLM: it decides from the names of the tensors which modules are adapted, whatever adapter_config.json targets.

In: a `Subject` and a row of its ledger. Out: what vLLM makes of it, as `LoRAModel.from_local_checkpoint` and
`LoRAModelManager.activate_adapter` do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from msgspec.structs import replace

from lora_probe.adapter import Adapter, AdapterModule, TrainedAs
from lora_probe.base import Base, EngineView, ModuleView
from lora_probe.base.engine_view import EXPERT, of_headers
from lora_probe.ledger import OK, Finding
from lora_probe.names import PREFIX, Key
from lora_probe.prediction.places import name_in_file, place_of, wrappers_of
from lora_probe.prediction.predictor import Predictor, Refusal, expected_shape, no_module, not_known
from lora_probe.rules.lp1_config import TASKS
from lora_probe.rules.lp2_names import wrapper_in_name
from lora_probe.rules.lp2_weights import half_missing
from lora_probe.rules.lp3_names import no_lora_layer_there, skipped
from lora_probe.rules.lp4_serving import MAX_RANKS, outside_filter
from lora_probe.rules.stored import Expected
from lora_probe.rules.subject import Place, Serving, Subject

NAME = "vllm"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Projections that vLLM fuses into one layer."""
_FUSED_NEARLY_ALWAYS = frozenset(FUSED[0] + FUSED[1])
"""Those that nearly all of its classes fuse."""


def _resolve(view: EngineView, adapter: Adapter, serving: Serving) -> dict[Key, Place]:
    texts = _text_modules(view) if serving.vllm.text_names_on_multimodal else {}
    return {pair.key: _place(view, pair, texts) for pair in adapter.modules}


def _place(view: EngineView, pair: AdapterModule, texts: Mapping[str, str]) -> Place:
    """vLLM's `parse_fine_tuned_lora_name`. `texts` are the `_text_modules` of a vLLM that tries them."""
    stored = name_in_file(pair)
    if view.skips(stored):
        return Place(None, None, f"{view.model} skips names with {', '.join(view.skip_prefixes)}")
    # vLLM removes every occurrence of the prefix from a name that begins with it.
    bare = stored.replace(PREFIX, "") if stored.startswith(PREFIX) else stored
    place = place_of(view, view.renamed(bare))
    if place.module is None and place.name is not None:
        tried = [f"{texts[end]}.{end}" for end in (place.name, place.name.removeprefix("model.")) if end in texts]
        if tried:
            name = min(tried, key=lambda module: module.partition(".")[0])
            return Place(name, view.modules[name])
    return place


def _text_modules(view: EngineView) -> dict[str, str]:
    """What stands behind the first dot of a module's name -> the first of the parts of the model that hold it, in the
    order of their names. vLLM 0.33 looks there for a text model's name (`_get_text_lora_names`)."""
    parts = {name.partition(".")[0] for name, module in view.modules.items() if not module.why_not} - {"model"}
    texts: dict[str, str] = {}
    for module in view.modules:
        part, dot, end = module.partition(".")
        if dot and part in parts:
            texts[end] = min(part, texts.get(end, part))
    return texts


def _judge(subject: Subject, row: Expected, place: Place | None) -> tuple[Finding, Finding]:
    """`read` and `placed`: the name after vLLM's own renaming, and whether the layer is one that it wraps."""
    assert row.entry is not None
    gone = Finding("absent")
    if place is None:
        named = wrapper_in_name(wrappers_of(row.entry))
        return (named, gone) if named is not None else (OK, not_known(subject))
    if place.dropped:
        return skipped(place.dropped), gone
    if place.module is None:
        return wrapper_in_name(wrappers_of(row.entry)) or no_module(row, subject.views[NAME]), gone
    if place.module.why_not:
        return OK, no_lora_layer_there(place.module.why_not)
    targets = subject.serving.lora_target_modules
    if targets is not None and not _passes(place, targets):
        return OK, outside_filter(targets)
    if place.module.packed and (missing := half_missing(row.entry)) is not None:
        # A packed layer is filled without the half, so nothing is added; vLLM reports nothing.
        return OK, dataclasses.replace(missing, value="absent")
    return OK, OK


def _passes(place: Place, targets: tuple[str, ...]) -> bool:
    assert place.name is not None
    assert place.module is not None
    return passes(place.name, place.module, targets)


def passes(name: str, module: ModuleView, targets: tuple[str, ...]) -> bool:
    """vLLM's `is_in_target_modules`: the last word or the whole name, of the packed layer or of its parts."""
    layer, last = module.engine_as.partition("[")[0], name.rpartition(".")[2]
    if {name, last, layer, layer.rpartition(".")[2]} & set(targets):
        return True
    # One named part of a packed layer wraps the whole layer.
    return module.packed and any(target in parts for target in targets for parts in FUSED if last in parts)


def _not_served(trained: TrainedAs, views: Mapping[str, EngineView]) -> str:
    """Classes that vLLM cannot serve, not with adapters, or not with the head that the adapter was trained with."""
    if not views:
        other = trained.task in TASKS and trained.task != "CAUSAL_LM"
        other = other or not (trained.model_class or CAUSAL[0]).endswith(CAUSAL)
        return "whether vLLM serves it depends on the base model" if other else ""
    view, trained_on = views.get(NAME), views.get("peft")
    if view is None:
        return ""
    if view.refuses:
        return f"vLLM serves this base model without adapters ({view.refuses})" if view.modules else view.refuses
    if trained.task in WITH_HEAD and trained_on is not None and view.model != trained_on.model:
        return f"vLLM serves this base model as {view.model}, not as the {trained_on.model} of the adapter"
    return ""


WITH_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
"""PEFT's tasks whose models have another head than the base that they are made of."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of transformers' causal language models."""


def _refuse(subject: Subject, row: Expected, place: Place | None) -> Refusal | None:
    """Why vLLM fails while it fills the slot (`set_lora`, `optimize`), if it does: shapes must not be larger."""
    pair = row.entry
    assert pair is not None
    if place is None or place.module is None:
        return None
    fitting = expected_shape(place, pair.embedding or place.module.kind == "embedding")
    targets = subject.serving.lora_target_modules
    if fitting is None or (targets and not _passes(place, targets)):
        return None
    tall, wide = fitting
    limit = subject.serving.max_lora_rank or MAX_RANKS[-1]
    missing = half_missing(pair)
    if missing is not None and (not place.module.packed or (pair.b is None and pair.scaling != 1)):
        return missing.code, f"`{pair.stored_as}`: {missing.message}"
    for tensor, most in ((pair.a, (limit, wide)), (pair.b, (tall, limit))):
        if tensor is None:
            continue
        if len(tensor.shape) != 2:
            return "LP206", f"`{tensor.name}` has shape {list(tensor.shape)}, which is not a matrix"
        if tensor.shape[0] > most[0] or tensor.shape[1] > most[1]:
            code = row.stored.code or "LP301"
            return code, f"`{tensor.name}` has shape {list(tensor.shape)}, but the layer accepts at most {list(most)}"
    return None


def view_of_headers(base: Base, engine: str, why: str) -> EngineView | None:
    """The view of a base if vLLM cannot describe it: layers that it probably fuses, names that its check accepts."""
    view = of_headers(base, engine, why)
    if view is None:
        return None
    modules = {name: replace(module, packed=_is_packed(name, module)) for name, module in view.modules.items()}
    words = {_from_experts_on(name) for name in modules}
    if any(module.kind == "experts" for module in modules.values()):
        words.add("experts")
    note = "it is unknown whether vLLM adapts the embeddings and the head of this model class"
    return replace(view, modules=modules, suffixes=tuple(sorted(words)), notes=(*view.notes, note))


def _is_packed(name: str, module: ModuleView) -> bool:
    last = name.rpartition(".")[2]
    return module.kind == "experts" or (module.kind == "linear" and last in _FUSED_NEARLY_ALWAYS)


def _from_experts_on(name: str) -> str:
    """What vLLM compares with its list: the last part of a name, for experts everything from `experts` on."""
    match = EXPERT.search(name)
    return name[match.start() + 1 :] if match else name.rpartition(".")[2]


PREDICTOR = Predictor(
    name=NAME,
    title="vLLM",
    judge=_judge,
    refuse=_refuse,
    not_served=_not_served,
    resolve=_resolve,
    view_of_headers=view_of_headers,
    needs=("vllm",),
    install="pip install lora-probe-vllm (in this repository: pip install ./plugins/vllm) next to your vLLM",
    ignored_fields=frozenset(
        {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
    ),
)
"""Entry point `vllm` of the group `lora_probe.predictors`. It is here, not in the plugin: vLLM is predicted where the
plugin is not installed."""
