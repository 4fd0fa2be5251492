"""PEFT's view of a base model: the modules of the transformers model, and the names that PEFT changes during a load.

In: the `config.json` of a base model, and how it was loaded in training. Out: an `EngineView`. The model is built on
torch's meta device, so no weights are read or created, whatever the size of the model. Code that comes with a model is
never run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from lora_probe.adapter import TrainedAs
from lora_probe.base import Base, EngineView, ModuleView, Rename
from lora_probe.base.engine_view import ModuleKind
from lora_probe.engines.peft.classes import class_of
from lora_probe.engines.peft.models import first_lines
from lora_probe.errors import EngineFailed

_CARET = re.compile(r"(?<![\\\[])\^")
"""A `^` in a pattern: the beginning of the text."""


def describe(base: Base, trained: TrainedAs, version: str) -> EngineView:
    """See `lora_probe.engines.Engine.describe`. `version` is PEFT's."""
    model = _on_meta(base, trained)
    heads = {id(head) for head in [_output_embeddings(model)] if head is not None}
    modules: dict[str, ModuleView] = {}
    parameters: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if not name:
            continue
        if fused := _fused(module):
            parameters[name] = fused
            shapes |= {f"{name}.{parameter}": shape for parameter, shape in _expert_shapes(module, fused)}
        modules[name] = _view(name, module, id(module) in heads, bool(fused))
    renames, notes = _conversions(model)
    return EngineView(
        engine="peft",
        version=version,
        model=type(model).__name__,
        modules=modules,
        renames=renames,
        takes_back=True,
        vocabulary=_vocabulary(model),
        experts="3d" if parameters else "",
        parameters=parameters,
        expert_shapes=shapes,
        default_targets=_default_targets(model),
        notes=notes,
    )


def _default_targets(model: Any) -> tuple[str, ...]:
    """PEFT's default target_modules for this kind of model."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    return tuple(sorted(TABLE.get(getattr(model.config, "model_type", ""), ())))


def _on_meta(base: Base, trained: TrainedAs) -> Any:
    """The model of `base` as it was loaded in training, without weights.

    Raises:
        EngineFailed: transformers, or diffusers, has no such model; with its own message.
    """
    import torch

    try:
        with torch.device("meta"):
            return _of_diffusers(base) if "_class_name" in base.config else _of_transformers(base, trained)
    except EngineFailed:
        raise
    # Both libraries may raise any exception; its message is passed on.
    except Exception as error:
        library = "diffusers" if "_class_name" in base.config else "transformers"
        raise EngineFailed(f"{library} cannot build the model of `{base.path}`: {first_lines(error)}") from error


def _of_transformers(base: Base, trained: TrainedAs) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
    if (cls := class_of(config, trained)) is not None:
        if cls.__name__.startswith("Auto"):
            return cls.from_config(config, trust_remote_code=False)
        return cls._from_config(config)
    named = next(iter(config.architectures or ()), None)
    what = f"class `{named}` (from config.json)" if named else "causal language model of this type"
    raise EngineFailed(f"transformers cannot build the model of `{base.path}`: it has no {what}")


def _of_diffusers(base: Base) -> Any:
    """A model of diffusers, whose config.json names its class (`UNet2DConditionModel`)."""
    try:
        diffusers = import_module("diffusers")
    except ImportError as error:
        raise EngineFailed(f"`{base.path}` is a model of diffusers, which is not installed") from error
    return getattr(diffusers, str(base.config["_class_name"])).from_config(dict(base.config))


def _output_embeddings(model: Any) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _vocabulary(model: Any) -> int | None:
    """The size of the vocabulary, None for a model without a text config."""
    get = getattr(model.config, "get_text_config", None)
    return getattr(get(), "vocab_size", None) if get is not None else None


def _view(name: str, module: Any, head: bool, experts: bool) -> ModuleView:
    """How PEFT treats one module; mirrors `peft.tuners.lora.layer.dispatch_default`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        return ModuleView("embedding", (module.num_embeddings, module.embedding_dim), name)
    if isinstance(module, nn.Linear):
        kind: ModuleKind = "head" if head else "linear"
        return ModuleView(kind, (module.out_features, module.in_features), name)
    if isinstance(module, Conv1D):
        return ModuleView("linear", (int(module.weight.shape[1]), int(module.weight.shape[0])), name)
    if experts:
        return ModuleView("experts", None, name)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
        return ModuleView("other", None, name)
    return ModuleView("other", None, name, why_not=f"PEFT does not adapt {type(module).__name__}")


def _expert_shapes(module: Any, parameters: list[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """(out, in) of the experts of parameters that are stored like that; PEFT read those the other way round up to 0.18.
    It has always read parameters that are stored as (in, out) in one way."""
    if not getattr(module, "is_transposed", False):
        for name in parameters:
            _, out, inner = getattr(module, name).shape
            yield name, (int(out), int(inner))


def _fused(module: Any) -> list[str]:
    """The parameters that contain the matrices of several experts: `[experts, ., .]`."""
    from torch import nn

    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
        return []
    return [name for name, value in module.named_parameters(recurse=False) if value.dim() == 3 and value.shape[0] > 1]


def _conversions(model: Any) -> tuple[tuple[Rename, ...], tuple[str, ...]]:
    """How `convert_peft_adapter_state_dict_for_transformers` changes the names of an adapter on `model`.

    Returns the renamings as steps, and a note on converters, which do more: they join tensors.
    """
    try:
        from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
    except ImportError:
        # transformers 4, or a PEFT without support for transformers 5: names are not changed.
        return (), ()
    if get_checkpoint_conversion_mapping(getattr(model.config, "model_type", "")) is None:
        return (), ()
    from transformers.core_model_loading import WeightRenaming

    registered = get_model_conversion_mapping(model)
    steps = [step for entry in registered if isinstance(entry, WeightRenaming) for step in renaming(entry)]
    converters = [
        entry for entry in build_peft_weight_mapping(registered, "default") if not isinstance(entry, WeightRenaming)
    ]
    joined = {pattern for entry in converters for pattern in entry.source_patterns}
    notes = (f"PEFT joins tensors named like {', '.join(sorted(joined))} when it loads an adapter",) if joined else ()
    return tuple(steps), notes


def renaming(entry: Any) -> Iterator[Rename]:
    r"""A `WeightRenaming` of transformers as `Rename` steps; mirrors `WeightTransform.rename_source_key`.

    That function replaces only the first match, with the entry's first target, where `\1` is the group inside the
    source that matched. With a scope, it only looks at the text after the scope, and `^` is the beginning of that text.
    """
    sources, target = list(entry.source_patterns), str(entry.target_patterns[0])
    scope, base_prefix = getattr(entry, "scope_prefix", None), getattr(entry, "base_model_prefix", None)
    starts = [""]
    if scope is not None:
        inner = f"{scope}." if scope else ""
        starts = [f"{base_prefix}.{inner}", inner] if base_prefix else [inner]
    # Atomic group: if the longer prefix matches, there is no backtracking to the shorter one.
    start = r"\A(?>" + "|".join(map(re.escape, starts)) + ")"
    begin = "(?:" + "|".join(rf"(?<=\A{re.escape(prefix)})" for prefix in starts) + ")"
    branches = []
    for number, source in enumerate(sources):
        pattern = _CARET.sub(lambda _: begin, source.replace("*.", r".*\."))
        branches.append(f"(?P<g{number}>{pattern})")
    old = f"(?P<before>{start}.*?)(?:{'|'.join(branches)})"
    compiled = re.compile(old, re.DOTALL)
    # Groups of other branches are empty, so one replacement works for all branches.
    inside = "".join(f"\\g<{compiled.groupindex[f'g{number}'] + 1}>" for number in range(len(sources)))
    literal = target.replace("\\1", "\0").replace("\\", "\\\\").replace("\0", inside)
    yield Rename("regex", f"(?s:{old})", f"\\g<before>{literal}")
