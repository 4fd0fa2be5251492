"""vLLM's view of a base model: its own model and its own LoRA manager, built on torch's meta device.

In: the `config.json` of a base model, and how it was loaded in training. Out: an `EngineView`. vLLM itself decides
which modules are wrapped and under which name: this reads the manager that vLLM creates, as a worker does after it has
loaded a model. No weights are read or created.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from lora_probe.adapter import TrainedAs
from lora_probe.base import Base, EngineView, ModuleView, Rename
from lora_probe.base.engine_view import ModuleKind
from lora_probe.engines.peft.models import short
from lora_probe.engines.peft.view import renaming
from lora_probe.errors import EngineFailed
from lora_probe.recording import write_json
from lora_probe_vllm.seams import (
    NAMES,
    Patches,
    SeamMoved,
    expert_shards,
    expert_sizes,
    mapper_parts,
    module_names,
    output_widths,
    packed_modules,
    rename_mapper,
    root_cause,
    seams,
    vllm_version,
)

NO_LORA = "{cls} does not support LoRA yet."
"""vLLM's message in `LoRAModelRunnerMixin.load_lora_model`."""

NOT_SERVED = "vLLM does not serve {cls}: it has no class for it, and its Transformers backend cannot run it"

META = torch.device("meta")

SETTINGS: dict[str, Any] = {
    "enable_lora": True,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "trust_remote_code": False,
}
"""The settings of the engine whose model is described: one process, and otherwise vLLM's defaults."""


def describe(base: Base, trained: TrainedAs) -> EngineView:
    """vLLM's view of `base`. Does not remove the process groups of size one, like every engine in one process.

    Raises:
        EngineFailed: vLLM cannot build the model, although it has a class for it; with its own message.
        SeamMoved: this vLLM does not have a required name.
    """
    # An embedding model is served by the pooling runner, also if its base is a causal language model.
    runner = "pooling" if trained.task == "FEATURE_EXTRACTION" else "auto"
    try:
        manager, vocabulary, notes = _manager(base, runner)
    except SeamMoved:
        raise
    except EngineFailed as error:
        if _has_class(base.architecture):
            raise
        cls = base.architecture or str(base.config.get("_class_name") or base.config.get("model_type"))
        refuses, notes = NOT_SERVED.format(cls=cls), (short(error.message),)
        return EngineView("vllm", vllm_version(), cls, {}, refuses=refuses, notes=notes)
    model = manager.model
    modules = dict(_wrapped(manager))
    modules |= {name: view for name, view in _bare(manager) if name not in modules}
    if manager.is_pooling_model:
        # `_get_lora_layer_weights`: a pooling model's names are also accepted without their first part.
        bare = {name.removeprefix("model."): view for name, view in modules.items() if not view.why_not}
        modules |= {name: view for name, view in bare.items() if name not in modules}
    return EngineView(
        engine="vllm",
        version=vllm_version(),
        model=type(model).__name__,
        modules=modules,
        renames=tuple(_renames(rename_mapper(model))),
        suffixes=tuple(module_names(manager)),
        skip_prefixes=tuple(getattr(model, "lora_skip_prefixes", None) or ()),
        vocabulary=vocabulary,
        experts=_experts(manager),
        refuses="" if manager.supported_lora_modules else NO_LORA.format(cls=type(model).__name__),
        notes=notes,
    )


def _has_class(architecture: str) -> bool:
    """Whether vLLM has a model class of this family, or adapts one: `LlamaForTokenClassification` is made of
    `LlamaForCausalLM`."""
    family = _TASK.sub("", architecture)
    return any(_TASK.sub("", name) == family for name in seams.registry.get_supported_archs())


_TASK = re.compile(r"(For[A-Z]\w+|LMHeadModel|EmbeddingModel|Model)$")


def _manager(base: Base, runner: str) -> tuple[Any, int, tuple[str, ...]]:
    """vLLM's LoRA manager, the size of the vocabulary, and notes for the report.

    Quantisation does not change names or shapes. So if this machine has no kernel for it (a folder may be checked on
    another machine than the server), the model is built without quantisation.
    """
    try:
        return *_built(base.path, runner), ()
    except EngineFailed:
        raise
    # vLLM may raise any exception when it builds a model; its message is passed on.
    except Exception as error:
        message = root_cause(error)
        plain = _unquantised(base.config)
        if plain is None:
            raise EngineFailed(f"vLLM cannot build the model of `{base.path}`: {message}") from error
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", plain)
        try:
            return *_built(Path(folder), runner), (
                f"vLLM cannot build this quantised model here, so its names are those without quantisation: {message}",
            )
        except EngineFailed:
            raise
        except Exception as error:
            raise EngineFailed(f"vLLM cannot build the model of `{base.path}`: {root_cause(error)}") from error


def _unquantised(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config without its quantisation; None if it has none."""
    marks = {"quantization_config", "compression_config"}
    quantised = bool(marks & set(config))
    plain = {key: value for key, value in config.items() if key not in marks}
    for key, value in plain.items():
        if isinstance(value, Mapping) and (inner := _unquantised(value)) is not None:
            plain[key], quantised = inner, True
    return plain if quantised else None


def _built(folder: Path, runner: str) -> tuple[Any, int]:
    """vLLM's LoRA manager on the meta device for the model in `folder`, and the size of its vocabulary.

    Mirrors `Worker.init_device`, `BaseModelLoader.load_model` without its weights, and `load_lora_model`.
    """
    config = seams.engine_args(model=str(folder), runner=runner, **SETTINGS).create_engine_config()
    with tempfile.TemporaryDirectory() as store, seams.current_config(config), Patches() as patches:
        seams.init_distributed(1, 0, f"file://{Path(store) / 'store'}", 0, "gloo")
        seams.init_parallel(1, 1)
        with META:
            model = seams.build_model(vllm_config=config)
        if not seams.supports_lora(model):
            return _nothing(model), int(config.model_config.get_vocab_size())
        _without_kernels(patches)
        worker = seams.lru_worker_manager(config, META, model.embedding_modules)
        with META:
            worker.create_lora_manager(model, config)
    return worker._adapter_manager, int(config.model_config.get_vocab_size())


def _nothing(model: Any) -> Any:
    """A stand-in for the manager of a class that does not accept adapters: `load_lora_model` raises before it
    exists."""
    return SimpleNamespace(
        model=model,
        modules={},
        packed_modules_mapping=packed_modules(model),
        supported_lora_modules=[],
        supports_mm=False,
        is_pooling_model=False,
        _is_moe=False,
    )


def _without_kernels(patches: Patches) -> None:
    """Build the manager without the parts that need a device: Punica's tables, and the kernels of experts.

    Which layers are wrapped, and by which class, does not depend on them.
    """

    def bare(original: Any) -> Any:
        def __init__(self: Any, base_layer: Any) -> None:
            torch.nn.Module.__init__(self)
            self.base_layer = base_layer

        return __init__

    module, name = NAMES["punica"]
    patches.wrap(import_module(module), name, lambda _: lambda *args, **named: object())
    for cls in (seams.fused_moe, seams.fused_moe_3d):
        patches.wrap(cls, "__init__", bare)
        for method in ("create_lora_weights", "set_mapping"):
            patches.wrap(cls, method, lambda _: lambda self, *args, **named: None)


def _wrapped(manager: Any) -> Iterator[tuple[str, ModuleView]]:
    """The layers that the manager wrapped; fused layers are split into their projections."""
    for name, layer in manager.modules.items():
        kind, parts = _kind(layer), manager.packed_modules.get(name)
        if kind == "experts":
            yield from _experts_of(manager, name, layer, parts)
        elif parts is None:
            yield name, ModuleView(kind, _shape(manager, name, layer), name)
        else:
            yield from _parts(name, layer, parts, "")


def _parts(name: str, layer: Any, parts: list[str], why_not: str) -> Iterator[tuple[str, ModuleView]]:
    widths = output_widths(layer) or []
    for index, part in enumerate(parts):
        shape = (int(widths[index]), int(layer.input_size)) if len(widths) == len(parts) else None
        yield part, ModuleView("linear", shape, f"{name}[{index}]", packed=True, why_not=why_not)


def _experts_of(manager: Any, name: str, layer: Any, parts: list[str] | None) -> Iterator[tuple[str, ModuleView]]:
    """Experts under the names of PEFT's two nested wrappers (3-D), or each expert's projections (2-D)."""
    if parts is None:
        for part in (name, f"{name}.base_layer"):
            yield part, ModuleView("experts", None, part)
        return
    hidden, inner = expert_sizes(layer)
    shards = expert_shards(manager.model)
    for index, part in enumerate(parts):
        shard = next((shard for end, shard in shards.items() if part.endswith(f".{end}")), None)
        shape = (hidden, inner) if shard == "w2" else (inner, hidden) if shard in ("w1", "w3") else None
        yield part, ModuleView("experts", shape, f"{name}[{index}]", packed=True)


def _bare(manager: Any) -> Iterator[tuple[str, ModuleView]]:
    """All modules of the model that are not wrapped, with the reason."""
    inside = ""
    for name, module in manager.model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, seams.wrapped):
            inside = f"{name}."
            continue
        kind = _kind(module)
        why_not = _why_not(manager, name, module, kind)
        parent, _, last = name.rpartition(".")
        packed = manager.packed_modules_mapping.get(last, ())
        if kind == "linear" and len(packed) > 1:
            yield from _parts(name, module, [f"{parent}.{part}" if parent else part for part in packed], why_not)
        else:
            yield name, ModuleView(kind, _shape(manager, name, module), name, why_not=why_not)


def _why_not(manager: Any, name: str, module: Any, kind: ModuleKind) -> str:
    """Why `_create_lora_modules` skips a module."""
    cls = type(manager.model).__name__
    if not manager.supported_lora_modules:
        return NO_LORA.format(cls=cls)
    if kind == "other":
        return f"vLLM does not adapt {type(module).__name__}"
    if kind == "head":
        return f"vLLM's {cls} does not adapt the output head"
    if manager.supports_mm and manager._get_punica_wrapper(name) is None:
        flag = getattr(manager.model, "supports_tower_connector_lora", False)
        return f"vLLM adapts the language model of {cls} only" + (" (no --enable-tower-connector-lora)" if flag else "")
    if kind == "embedding":
        return f"vLLM's {cls} does not adapt embeddings"
    return f"vLLM has no LoRA layer for this {type(module).__name__}"


def _kind(module: Any) -> ModuleKind:
    base = getattr(module, "base_layer", module)
    if isinstance(base, seams.experts):
        return "experts"
    if isinstance(base, seams.head) or (isinstance(base, seams.logits) and base is not module):
        return "head"
    if isinstance(base, seams.embedding | torch.nn.Embedding):
        return "embedding"
    return "linear" if isinstance(base, seams.linear | torch.nn.Linear) else "other"


def _shape(manager: Any, name: str, module: Any) -> tuple[int, int] | None:
    """(out, in); for embeddings and heads without vLLM's padding."""
    base = getattr(module, "base_layer", module)
    if isinstance(base, seams.logits):
        # A head's LoRA layer is at the logits, but it adapts the module of this name.
        head = manager.model.get_submodule(name)
        base = getattr(head, "base_layer", head)
    if isinstance(base, seams.embedding):
        return int(base.org_vocab_size), int(base.embedding_dim)
    if isinstance(base, torch.nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    if isinstance(base, torch.nn.Linear):
        return base.out_features, base.in_features
    return (int(base.output_size), int(base.input_size)) if isinstance(base, seams.linear) else None


def _renames(mapper: Any) -> Iterator[Rename]:
    """vLLM's mapping of names as steps; mirrors `WeightsMapper.map_name`."""
    if mapper is None:
        return
    transformers_own, others = mapper_parts(mapper)
    for entry in transformers_own:
        yield from renaming(entry)
    for kind, pairs in others:
        for old, new in pairs:
            yield Rename(kind, old, new)  # type: ignore[arg-type]


def _experts(manager: Any) -> Literal["", "2d", "3d"]:
    if not manager._is_moe:
        return ""
    return "3d" if manager._is_3d_moe_model else "2d"
