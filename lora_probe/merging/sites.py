"""Where an adapter changes a model: `Site`s, each a block of rows of one tensor of the base.

In: an adapter, and the base of a `View` (`overlay.py`). Out: the sites, and every tensor of the adapter without one,
with the reason. Names and layouts are those of PEFT 0.21 (`tuners/lora/layer.py`) and of transformers' checkpoints: a
Conv1D is stored transposed, and so are an embedding's A and B.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lora_probe.adapter import Adapter, AdapterModule, OtherTensor
from lora_probe.adapter.variants import DORA, EXTRAS, LORA_BIAS, initialisation
from lora_probe.base import Checkpoint, StoredTensor
from lora_probe.files.weights import TensorHeader
from lora_probe.merging.names import HEAD, Names, embeddings_of, tied_place
from lora_probe.names import PREFIX, Key, projection_of

SiteKind = Literal["linear", "conv1d", "embedding", "expert", "transposed expert", "bias", "whole", "tokens"]

_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose layers are transformers' Conv1D, but for the heads; PEFT asks the live layer."""
_LINEAR_HEADS = ("lm_head", "score", "classifier", "qa_outputs")


@dataclass(frozen=True)
class Site:
    """Rows `start` to `stop` of `tensor`, and what the adapter does to them.

    `pair` adds s·B·A to them. For fused experts, the pair holds `experts` of them, and rows `cut` of B are the `part`
    that this site holds. `source` replaces the rows (`whole`, `tokens`) or is added times `scaling` (`bias`).
    """

    key: Key
    tensor: str
    kind: SiteKind
    start: int
    stop: int
    scaling: float = 1.0
    pair: AdapterModule | None = None
    part: str | None = None
    cut: tuple[int, int] | None = None
    experts: int = 1
    source: TensorHeader | None = None
    tokens: tuple[int, ...] = ()
    magnitude: TensorHeader | None = None
    rebased: str | None = None

    @property
    def label(self) -> str:
        """The module's path, with parameter and expert where there are several."""
        module, parameter, expert = self.key
        name = self.part or parameter
        path = module if name == "weight" else f"{module}.{name}"
        return path if expert is None else f"{path}[{expert}]"


@dataclass(frozen=True)
class Unplaced:
    """A module or tensor of the adapter that cannot be checked, and why. `misfit`: its shape is not the base's."""

    label: str
    why: str
    misfit: bool = False


Placed = Iterator[Site | Unplaced]


def of_pair(adapter: Adapter, module: AdapterModule, base: Checkpoint, names: Names) -> Placed:
    """The sites of a pair of A and B on a module's weight."""
    name = names.find(f"{module.module}.weight") or tied_place(module.module, base)
    if name is None:
        yield Unplaced(module.module, "the base has no tensor with this name")
        return
    tensor = base.tensors[name]
    kind = _kind(adapter, module, tensor, base)
    if kind is None:
        assert module.b is not None
        shape = [module.b.shape[0], module.inputs]
        yield Unplaced(module.module, f"s·B·A has shape {shape}, the base's weight {list(tensor.shape)}", misfit=True)
        return
    extras = {extra.name.removeprefix(PREFIX).removeprefix(f"{module.stored_as}."): extra for extra in module.extras}
    magnitudes = [extras.pop(what) for what in list(extras) if EXTRAS[DORA.field].is_named(what)]
    if adapter.config.raw.get(DORA.field) and not magnitudes:
        yield Unplaced(module.module, f"the config asks for {DORA.title}, and its magnitude vector is missing")
        return
    init = initialisation(adapter.config.raw.get("init_lora_weights"))
    recomputed = init.name if init is not None and init.base == "recomputed" else None
    yield Site(
        key=module.key,
        tensor=name,
        kind=kind,
        start=0,
        stop=tensor.matrix[0],
        scaling=module.scaling,
        pair=module,
        magnitude=magnitudes[0] if magnitudes else None,
        rebased=None if module.embedding else recomputed,
    )
    bias = extras.pop(EXTRAS[LORA_BIAS.field].name, None)
    if bias is not None:
        yield from _of_bias(module, bias, tensor, base)
    for what in extras:
        if any(extra.in_training and extra.is_named(what) for extra in EXTRAS.values()):
            continue
        yield Unplaced(module.module, f"what `{what}` does is not known")


def _kind(adapter: Adapter, module: AdapterModule, tensor: StoredTensor, base: Checkpoint) -> SiteKind | None:
    """How the weight lies in the file; None where s·B·A does not fit it.

    PEFT corrects `fan_in_fan_out` by the class of the live layer. Here the shape decides, or the model type if the
    weight is square.
    """
    assert module.b is not None
    shape = module.b.shape[0], module.inputs
    if module.embedding:
        return "embedding" if tensor.shape == shape[::-1] else None
    if shape[0] == shape[1] and tensor.shape == shape:
        model_type = base.config.get("model_type")
        flag = bool(adapter.config.raw.get("fan_in_fan_out"))
        transposed = model_type in _CONV1D and projection_of(module.module) not in _LINEAR_HEADS if model_type else flag
        return "conv1d" if transposed else "linear"
    if tensor.shape == shape:
        return "linear"
    return "conv1d" if tensor.shape == shape[::-1] else None


def _of_bias(module: AdapterModule, bias: TensorHeader, tensor: StoredTensor, base: Checkpoint) -> Placed:
    name = tensor.name.removesuffix("weight") + "bias"
    key = (module.module, "bias", None)
    label = f"{module.module}.bias"
    if name not in base.tensors:
        yield Unplaced(label, "lora_bias is set but the base's layer has no bias, which PEFT cannot merge")
    elif base.tensors[name].shape != bias.shape:
        yield Unplaced(
            label, f"lora_B's bias has shape {list(bias.shape)}, the base's {list(base.tensors[name].shape)}"
        )
    else:
        yield Site(key, name, "bias", 0, 1, module.scaling, source=bias)


def of_other(adapter: Adapter, other: OtherTensor, base: Checkpoint, names: Names) -> Placed:
    """A tensor that replaces one of the base's (`modules_to_save`, biases), or some of its rows (trained tokens)."""
    path = other.tensor.name.removeprefix(PREFIX).replace(".base_layer.", ".")
    if "trainable_tokens_delta" in path:
        yield from _of_tokens(adapter, other, path, base, names)
        return
    module, _, parameter = path.rpartition(".")
    name = names.find(path) or tied_place(module, base)
    if not other.understood or name is None:
        why = other.what if not other.understood else "neither base nor merged model has a tensor with this name"
        yield Unplaced(path, why)
        return
    tensor = base.tensors[name]
    if tensor.shape != other.tensor.shape:
        yield Unplaced(path, f"it has shape {list(other.tensor.shape)}, the base's {name} {list(tensor.shape)}")
        return
    yield Site((module, parameter, None), name, "whole", 0, tensor.matrix[0], source=other.tensor)


def _of_tokens(adapter: Adapter, other: OtherTensor, path: str, base: Checkpoint, names: Names) -> Placed:
    module = re.split(r"\.(?:token_adapter\.)?trainable_tokens_delta", path)[0]
    name = names.find(f"{module}.weight") or tied_place(module, base)
    tokens = _tokens(adapter, module)
    fits = name is not None and len(tokens) == other.tensor.shape[0]
    if name is None or not fits or max(tokens, default=0) >= base.tensors[name].shape[0]:
        yield Unplaced(module, f"the config's {len(tokens)} trained tokens do not match the tensors")
        return
    tensors = {module: name}
    if base.tied and HEAD in base.tensors and name == embeddings_of(base):
        # Input and output share the trained tokens, even if a merge has untied them.
        tensors[HEAD.removesuffix(".weight")] = HEAD
    for path, tensor in tensors.items():
        rows = base.tensors[tensor].matrix[0]
        yield Site((path, "weight", None), tensor, "tokens", 0, rows, source=other.tensor, tokens=tokens)


def _tokens(adapter: Adapter, module: str) -> tuple[int, ...]:
    """`trainable_token_indices`: one list, or a list for each module, named by the end of its path."""
    indices = adapter.config.raw.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((own for name, own in indices.items() if module == name or module.endswith(f".{name}")), [])
    return tuple(int(index) for index in indices or ())
