"""Where an adapter changes a model: `Site`s, each a stretch of rows of one tensor of the base.

In: an adapter and the base's checkpoint. Out: the sites, and every tensor of the adapter that has none, with why.
Names and layouts are those of PEFT 0.21 (`tuners/lora/layer.py`) and of transformers' checkpoints: a Conv1D lies
transposed, an embedding's A and B as well, fused experts may lie in the file one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lora_probe.adapter import PREFIX, Adapter, AdapterModule, Key, OtherTensor, layer_of, natural
from lora_probe.checkpoint import Checkpoint, StoredTensor
from lora_probe.weights import TensorHeader

Kind = Literal["linear", "conv1d", "embedding", "expert", "transposed expert", "bias", "whole", "tokens"]

HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens", "wte", "embed_in")
"""What the output head is called, and the input embeddings."""
REBASING = ("pissa", "olora")
"""Initialisations that take a part out of the base; PEFT takes it out again whenever it loads the adapter."""
UNMERGEABLE = {
    "alora_invocation_tokens": "aLoRA, which PEFT does not merge",
    "arrow_config": "Arrow, which PEFT does not merge",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "layer_replication: the model has layers that the base's files lack",
}
"""Fields of the config whose merge is not s·B·A, and what they are."""
_OTHER_BASES = ("corda", "loftq", "lora_ga")
"""Initialisations that change the base by data that is gone."""
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text")
"""Model types whose fused experts lie as (experts, in, out); PEFT asks the live module's `is_transposed`."""
_APART = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""How transformers names the parts of fused experts that lie in the file one by one."""
_EXPERT = re.compile(r"^(?P<home>.*\bexperts)\.(?P<expert>\d+)\.(?P<part>\w+)\.weight$")


@dataclass(frozen=True)
class Site:
    """Rows `start` to `stop` of `tensor`, and what the adapter does to them.

    `pair` changes them by s·B·A, of which B's rows `cut` belong here (parts of fused experts, which hold `experts` of
    them); `source` replaces them
    (`whole`, `tokens`) or is added times `scaling` (`bias`). `original` stands in for the base's values where the
    adapter carries them itself (PEFT saves an embedding's base beside it).
    """

    key: Key
    tensor: str
    kind: Kind
    start: int
    stop: int
    scaling: float = 1.0
    pair: AdapterModule | None = None
    cut: tuple[int, int] | None = None
    experts: int = 1
    source: TensorHeader | None = None
    tokens: tuple[int, ...] = ()
    magnitude: TensorHeader | None = None
    original: TensorHeader | None = None
    rebased: str | None = None

    @property
    def label(self) -> str:
        """The module's path, with what tells its parameters and experts apart."""
        module, parameter, expert = self.key
        path = module if parameter == "weight" else f"{module}.{parameter}"
        return path if expert is None else f"{path}[{expert}]"


@dataclass(frozen=True)
class Unplaced:
    """A module or a tensor of the adapter that cannot be checked, and why."""

    key: Key
    why: str


@dataclass(frozen=True)
class Plan:
    """All that an adapter does to a base. `overwritten` are tensors that the adapter carries as the base's own."""

    sites: tuple[Site, ...]
    unplaced: tuple[Unplaced, ...]
    overwritten: Mapping[str, TensorHeader] = field(default_factory=dict)

    def by_tensor(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            found.setdefault(site.tensor, []).append(site)
        return found


def plan(adapter: Adapter, base: Checkpoint) -> Plan:
    """Place every tensor of `adapter` on `base`."""
    names = _Names(base.tensors)
    originals, others = _originals(adapter, base, names)
    sites: list[Site] = []
    unplaced = [Unplaced((adapter.config.path.name, "", None), why) for why in _refusals(adapter)]
    for module in adapter.modules:
        placed = list(_of_module(adapter, module, base, names, originals))
        sites += [one for one in placed if isinstance(one, Site)]
        unplaced += [one for one in placed if isinstance(one, Unplaced)]
    for other in others:
        placed = list(_of_other(adapter, other, base, names))
        sites += [one for one in placed if isinstance(one, Site)]
        unplaced += [one for one in placed if isinstance(one, Unplaced)]
    used = {site.tensor for site in sites if site.original is not None}
    alone = {name: header for name, header in originals.items() if name not in used}
    return Plan(tuple(sorted(sites, key=lambda site: natural(site.label))), tuple(unplaced), alone)


def _refusals(adapter: Adapter) -> Iterator[str]:
    raw = adapter.config.raw
    for key, what in UNMERGEABLE.items():
        if raw.get(key):
            yield f"the adapter is {what}"
    init = str(raw.get("init_lora_weights", "")).lower()
    if init.startswith(_OTHER_BASES):
        yield f"init_lora_weights is {init}: it changed the base by data that is not here"
    if "_niter_" in init:
        yield f"init_lora_weights is {init}: what it took out of the base is random"


class _Names:
    """Finds a module's tensor in a checkpoint whose names may have one prefix more or less (`transformer.`)."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self._ends: dict[str, list[str]] = {}
        for name in self.names:
            _, _, rest = name.partition(".")
            self._ends.setdefault(rest, []).append(name)

    def find(self, name: str) -> str | None:
        if name in self.names:
            return name
        shorter = name.partition(".")[2]
        if shorter in self.names:
            return shorter
        longer = self._ends.get(name, [])
        return longer[0] if len(longer) == 1 else None


def _originals(adapter: Adapter, base: Checkpoint, names: _Names) -> tuple[dict[str, TensorHeader], list[OtherTensor]]:
    """The tensors that the adapter carries as the base's own, by their name in the base; and all the others.

    PEFT saves an adapted embedding's base weight, and the biases with `bias="lora_only"`, and loads both again.
    """
    found: dict[str, TensorHeader] = {}
    others = []
    for other in adapter.others:
        path = other.tensor.name.removeprefix(PREFIX)
        own = ".base_layer." in path or path.endswith(".bias")
        plain = path.replace(".base_layer.", ".")
        name = (names.find(plain) or _tied_place(plain.removesuffix(".weight"), base)) if own else None
        if name is not None:
            found[name] = other.tensor
        else:
            others.append(other)
    return found, others


def _of_module(
    adapter: Adapter, module: AdapterModule, base: Checkpoint, names: _Names, originals: Mapping[str, TensorHeader]
) -> Iterator[Site | Unplaced]:
    if module.a is None or module.b is None:
        yield Unplaced(module.key, "half of its pair is missing")
        return
    if len(module.a.shape) != 2 or len(module.b.shape) != 2:
        yield Unplaced(module.key, f"A is {list(module.a.shape)} and B {list(module.b.shape)}: it is no linear layer")
        return
    if module.parameter == "weight":
        name = names.find(f"{module.module}.weight") or _tied_place(module.module, base)
        yield from (
            [Unplaced(module.key, "the base has no tensor of this name")]
            if name is None
            else _of_pair(adapter, module, base.tensors[name], base, originals)
        )
    else:
        yield from _of_experts(module, base, names)


def _tied_place(module: str, base: Checkpoint) -> str | None:
    """Where a tied output head lies: in the input embeddings."""
    if module.rpartition(".")[2] != "lm_head" or not base.tied:
        return None
    return embeddings_of(base)


def embeddings_of(base: Checkpoint) -> str | None:
    """The tensor of the input embeddings."""
    found = [name for name in base.tensors if name.removesuffix(".weight").endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def _of_pair(
    adapter: Adapter,
    module: AdapterModule,
    tensor: StoredTensor,
    base: Checkpoint,
    originals: Mapping[str, TensorHeader],
) -> Iterator[Site | Unplaced]:
    assert module.a is not None
    assert module.b is not None
    shape = module.b.shape[0], module.a.shape[1]
    flipped = module.embedding or bool(adapter.config.raw.get("fan_in_fan_out"))
    kind: Kind = "embedding" if module.embedding else "linear"
    if tensor.shape != (shape[::-1] if flipped else shape):
        if module.embedding or tensor.shape != (shape if flipped else shape[::-1]):
            yield Unplaced(module.key, f"s·B·A is {list(shape)}, the base's {tensor.name} {list(tensor.shape)}")
            return
        # PEFT corrects the flag from the layer's class, which the shape shows.
        flipped = not flipped
    if flipped and not module.embedding:
        kind = "conv1d"
    extras = {extra.name.removeprefix(PREFIX).removeprefix(f"{module.stored_as}."): extra for extra in module.extras}
    magnitude = next((extra for what, extra in extras.items() if what.startswith("lora_magnitude_vector")), None)
    if adapter.config.raw.get("use_dora") and magnitude is None:
        yield Unplaced(module.key, "the config says DoRA, and its magnitude vector is missing")
        return
    init = str(adapter.config.raw.get("init_lora_weights", "")).lower()
    yield Site(
        key=module.key,
        tensor=tensor.name,
        kind=kind,
        start=0,
        stop=tensor.matrix[0],
        scaling=module.scaling,
        pair=module,
        magnitude=magnitude,
        original=originals.get(tensor.name),
        rebased=init if init in REBASING and not module.embedding else None,
    )
    bias = extras.pop("lora_B.bias", None)
    if bias is not None:
        yield from _of_bias(module, bias, tensor, base)
    for what in extras.keys() - {"lora_magnitude_vector", "lora_magnitude_vector.weight"}:
        yield Unplaced(module.key, f"what `{what}` does is not known")


def _of_bias(
    module: AdapterModule, bias: TensorHeader, tensor: StoredTensor, base: Checkpoint
) -> Iterator[Site | Unplaced]:
    name = tensor.name.removesuffix("weight") + "bias"
    key = (module.module, "bias", None)
    if name not in base.tensors:
        yield Unplaced(key, "lora_bias is set, and the base's layer has no bias: PEFT cannot merge that")
    elif base.tensors[name].shape != bias.shape:
        yield Unplaced(key, f"lora_B's bias is {list(bias.shape)}, the base's {list(base.tensors[name].shape)}")
    else:
        yield Site(key, name, "bias", 0, 1, module.scaling, source=bias)


def _of_experts(module: AdapterModule, base: Checkpoint, names: _Names) -> Iterator[Site | Unplaced]:
    """Fused expert parameters (PEFT's ParamWrapper): A is (experts·r, in), B (out, r·experts), expert last."""
    assert module.a is not None
    assert module.b is not None
    fused = names.find(f"{module.module}.{module.parameter}")
    if fused is not None:
        yield from _fused(module, base.tensors[fused], str(base.config.get("model_type")))
        return
    parts = _parts(module, base)
    if not parts:
        yield Unplaced(module.key, "the base has no such parameter, fused or one expert at a time")
        return
    count = 1 + max(expert for expert, _ in parts)
    rank = module.a.shape[0] // count
    heights = {number: base.tensors[name].shape[0] for (_, number), name in parts.items()}
    if rank * count != module.a.shape[0] or sum(heights.values()) != module.b.shape[0] or len(parts) % count:
        yield Unplaced(module.key, f"B is {list(module.b.shape)}, which does not fit {count} experts of the base")
        return
    for (expert, number), name in parts.items():
        start = sum(height for other, height in heights.items() if other < number)
        cut = start, start + heights[number]
        key = (module.module, module.parameter, expert)
        yield Site(key, name, "expert", 0, heights[number], module.scaling, module, cut, count)


def _fused(module: AdapterModule, tensor: StoredTensor, model_type: str) -> Iterator[Site | Unplaced]:
    assert module.a is not None
    assert module.b is not None
    shape = module.b.shape[0], module.a.shape[1]
    if len(tensor.shape) == 2 and tensor.shape == shape:
        yield Site(module.key, tensor.name, "expert", 0, shape[0], module.scaling, module)
        return
    if len(tensor.shape) != 3 or tensor.shape[1:] not in (shape, shape[::-1]):
        yield Unplaced(
            module.key, f"s·B·A is {list(shape)} for each expert, the base's {tensor.name} {list(tensor.shape)}"
        )
        return
    square = shape[0] == shape[1]
    transposed = model_type in _TRANSPOSED_EXPERTS if square else tensor.shape[1:] != shape
    kind: Kind = "transposed expert" if transposed else "expert"
    height = tensor.shape[1]
    count = tensor.shape[0]
    if module.a.shape[0] % count:
        yield Unplaced(module.key, f"A is {list(module.a.shape)}, which does not fit {count} experts of the base")
        return
    for expert in range(count):
        key = (module.module, module.parameter, expert)
        yield Site(key, tensor.name, kind, expert * height, (expert + 1) * height, module.scaling, module, None, count)


def _parts(module: AdapterModule, base: Checkpoint) -> dict[tuple[int, int], str]:
    """(expert, number of the part) -> tensor, for experts that lie in the file one by one."""
    layer = layer_of(module.module)
    for words in _APART.get(module.parameter, ()):
        found = {}
        for name in base.tensors:
            match = _EXPERT.match(name)
            if match and match["part"] in words and layer_of(name) == layer:
                found[int(match["expert"]), words.index(match["part"])] = name
        if found:
            return dict(sorted(found.items()))
    return {}


def _of_other(adapter: Adapter, other: OtherTensor, base: Checkpoint, names: _Names) -> Iterator[Site | Unplaced]:
    """A tensor that replaces one of the base's (`modules_to_save`), or some of its rows (trained tokens)."""
    path = other.tensor.name.removeprefix(PREFIX)
    if "trainable_tokens_delta" in path:
        module = re.split(r"\.(?:token_adapter\.)?trainable_tokens_delta", path)[0]
        name = names.find(f"{module}.weight") or _tied_place(module, base)
        tokens = _tokens(adapter, module)
        if (
            name is None
            or len(tokens) != other.tensor.shape[0]
            or max(tokens, default=0) >= base.tensors[name].shape[0]
        ):
            yield Unplaced(
                (module, "weight", None), f"{len(tokens)} trained tokens in the config do not fit the tensors"
            )
            return
        places = {module: name}
        if base.tied and HEAD in base.tensors and module.endswith(EMBEDDINGS):
            # Input and output share the trained tokens, also where a merge has untied them.
            places[HEAD.removesuffix(".weight")] = HEAD
        for place, home in places.items():
            rows = base.tensors[home].matrix[0]
            yield Site((place, "weight", None), home, "tokens", 0, rows, source=other.tensor, tokens=tokens)
        return
    name = names.find(path)
    if not other.understood or name is None:
        why = other.what if not other.understood else "the base has no tensor of this name"
        yield Unplaced((path, "", None), why)
        return
    tensor = base.tensors[name]
    if tensor.shape != other.tensor.shape:
        yield Unplaced((path, "", None), f"it is {list(other.tensor.shape)}, the base's {name} {list(tensor.shape)}")
        return
    module, _, parameter = path.rpartition(".")
    yield Site((module, parameter, None), name, "whole", 0, tensor.matrix[0], source=other.tensor)


def _tokens(adapter: Adapter, module: str) -> tuple[int, ...]:
    """`trainable_token_indices`: a list, or one for each module by the end of its path."""
    indices = adapter.config.raw.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((found for name, found in indices.items() if module == name or module.endswith(f".{name}")), [])
    return tuple(int(index) for index in indices or ())
