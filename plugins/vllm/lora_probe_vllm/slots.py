"""The layer of each module in vLLM, and whether its slot holds the values of the file.

In: the LoRA manager's layers, and pairs of an adapter. Out: `Home` (layer and slice) for a name of the adapter, and a
`Finding` for `placed`: the adapter's values are cast and scaled as in vLLM and compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.fused import of_each
from lora_probe.base import Shapes
from lora_probe.engines.held import relative_difference
from lora_probe.ledger import OK, Finding
from lora_probe.names import ranges
from lora_probe.recording import Floats, Shard
from lora_probe.rules.lp5_loading import not_measured, placed_differs, placed_empty
from lora_probe_vllm.experts import W2
from lora_probe_vllm.seams import is_fully_sharded, is_missing, rename_mapper, seams

OPTIONAL = "model."
"""What vLLM adds to the names of a pooling model's adapter that do not begin with it (`_get_lora_layer_weights`)."""


@dataclass(frozen=True)
class Home:
    """One slice of one of vLLM's LoRA layers. `engine_as` is its name in messages."""

    name: str
    layer: Any
    slice: int
    slices: int
    fused: str = ""
    """The parameter of fused experts, `gate_up_proj` or `down_proj`: then the pair belongs in several slices."""

    @property
    def engine_as(self) -> str:
        return f"{self.name}[{self.slice}]" if self.slices > 1 and not self.fused else self.name

    @property
    def recordable(self) -> bool:
        """Whether the stand-in supports the layer: linear layers and embeddings, but not yet heads and experts."""
        return isinstance(self.layer, seams.linear_layer) or self.embeds

    @property
    def routes(self) -> bool:
        """Whether it is one projection of one expert, whose rows are those that the router sends there."""
        if not isinstance(self.layer, seams.fused_moe) or self.layer.use_ep:
            return False
        return self.slices == self._experts * self._projections

    @property
    def samples(self) -> bool:
        """Whether it is a head over the vocabulary, whose rows are the tokens that are sampled."""
        return isinstance(self.layer, seams.head_layer)

    @property
    def _experts(self) -> int:
        """How many experts this rank has."""
        return int(self.layer.w2_lora_a_stacked[0].shape[1])

    @property
    def _projections(self) -> int:
        return len(self.layer.w13_lora_a_stacked) + 1

    @property
    def parts(self) -> Iterator[Home]:
        """The slices of a pair of fused experts: one for each expert, or two, for w1 and w3."""
        of_expert = range(self._projections)
        chosen = [part for part in of_expert if (part == W2) == (self.fused == "down_proj")]
        for expert in range(self._experts):
            for part in chosen:
                yield replace(self, slice=expert * self._projections + part, fused="")

    @property
    def split(self) -> bool:
        """Whether it is a pair of fused experts, of which every expert has a slice of its own."""
        return bool(self.fused) and self.routes

    @property
    def expert(self) -> tuple[int, int]:
        """The number of the expert, and 0 to 2 for w1, w2, w3: the order of vLLM's own list of an expert's modules."""
        return divmod(self.slice, self._projections)

    @property
    def embeds(self) -> bool:
        """Whether it is an embedding, which looks up the columns of A instead of multiplying with it."""
        return isinstance(self.layer, seams.embedding_layer)

    @property
    def shard(self) -> Shard | None:
        """What this tensor-parallel rank has of the slice; None if it has all of it."""
        ranks, rank = getattr(self.layer, "tp_size", 1), getattr(self.layer, "tp_rank", 0)
        if ranks == 1 or not self.recordable or self.embeds:
            return None
        if isinstance(self.layer, seams.row_parallel_layer):
            return Shard("both" if is_fully_sharded(self.layer) else "input", rank, ranks)
        if not isinstance(self.layer, seams.column_parallel_layer):
            return None
        replicas = getattr(self.layer.base_layer, "num_kv_head_replicas", 1) if self.slice else 1
        return Shard("output", rank // replicas, ranks // replicas)


class Homes:
    """The names that an adapter may use in one engine, and their layers."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.mapper = rename_mapper(manager.model)
        self.wrapped: dict[str, Home] = {}
        for name, layer in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            for index, part in enumerate(parts):
                self.wrapped[part] = Home(name, layer, index, len(parts))
        self.fused = dict(_fused(manager))
        self.known = set(self.wrapped)
        self.elsewhere: list[str] = []
        for name, module in manager.model.named_modules():
            if is_missing(module):
                self.elsewhere.append(name)
                continue
            parent, _, last = name.rpartition(".")
            self.known.add(name)
            for part in manager.packed_modules_mapping.get(last, ()):
                self.known.add(f"{parent}.{part}" if parent else part)

    def home_of(self, name: str) -> Home | None:
        """The home of a module of an adapter by its engine name."""
        return self.fused.get(name) or self.wrapped.get(name)

    def on_another_rank(self, name: str) -> bool:
        """Whether a module belongs to a layer on another pipeline rank."""
        return any(name == missing or name.startswith(f"{missing}.") for missing in self.elsewhere)

    def of_base(self, shapes: Shapes) -> dict[str, str]:
        """For each module of the base's files that this engine has: its name there, and in the engine."""
        return renamed(shapes, self.known, self.mapper, self.on_another_rank)

    def engine_name(self, pair: AdapterModule, renamed: bool = False) -> str | None:
        """The pair's name after vLLM's own renaming (`renamed`: it has that name already); None if vLLM cannot parse
        it."""
        if renamed:
            return pair.module
        tensor = pair.a or pair.b
        if tensor is None:
            return None
        try:
            name: str = seams.parse_name(tensor.name, self.mapper)[0]
        except ValueError:
            return None
        whole = f"{OPTIONAL}{name}"
        return whole if self.manager.is_pooling_model and name not in self.known and whole in self.known else name

    def is_taken(self, lora: Any, name: str) -> bool:
        """Whether an adapter that vLLM has read has weights for a module."""
        short = name.removeprefix(OPTIONAL) if self.manager.is_pooling_model else name
        return lora.get_lora(name) is not None or lora.get_lora(short) is not None


def _fused(manager: Any) -> Iterator[tuple[str, Home]]:
    """The names of fused experts in an adapter, where the engine takes them: vLLM reads the outer wrapper of PEFT as
    down_proj, and the inner one as gate_up_proj."""
    mixed = getattr(manager.lora_config, "enable_mixed_moe_lora_format", False)
    for name, layer in manager.modules.items():
        if isinstance(layer, seams.fused_moe) and (mixed or isinstance(layer, seams.fused_moe_3d)):
            slices = layer.w2_lora_a_stacked[0].shape[1] * (len(layer.w13_lora_a_stacked) + 1)
            yield name, Home(name, layer, 0, slices, "down_proj")
            yield f"{name}.base_layer", Home(name, layer, 0, slices, "gate_up_proj")


def renamed(
    names: Iterable[str], known: set[str], mapper: Any, elsewhere: Callable[[str], bool] = lambda _: False
) -> dict[str, str]:
    """For each of `names` that is in `known` after the engine's own renaming (or is `elsewhere`): its name there.

    Names may not have a prefix that the model's class adds (`h.0.attn` for `transformer.h.0.attn`), so a unique ending
    also matches.
    """
    ends: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for begin in range(1, len(parts)):
            ends.setdefault(".".join(parts[begin:]), []).append(name)
    by_name = {}
    for name in names:
        mapped = mapper._map_name(name) if mapper is not None else name
        if mapped is None:
            continue
        candidates = ends.get(mapped, [])
        if mapped in known or elsewhere(mapped):
            by_name[name] = mapped
        elif len(candidates) == 1:
            by_name[name] = candidates[0]
    return by_name


@dataclass(frozen=True)
class Placement:
    """The part of a pair that belongs in one slice on this rank: `a: [r, in]`, `b: [out, r]`, in the file's dtype
    widened to float32, and the factor that vLLM folds into B."""

    a: Floats
    b: Floats
    scaling: float

    def replayed(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A and s·B as in vLLM: cast first, then B times the scaling in that dtype (`optimize`)."""
        b = torch.from_numpy(self.b).to(dtype)
        return torch.from_numpy(self.a).to(dtype), b if self.scaling == 1 else b * self.scaling


def placements(adapter: Adapter, pair: AdapterModule, home: Home) -> dict[tuple[int, int], Placement]:
    """The expected contents of every slice of a pair of fused experts, by expert and projection; none for half a pair,
    or if it has another number of experts."""
    parts = list(home.parts)
    if pair.a is None or pair.b is None or len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return {}
    experts = len({part.expert[0] for part in parts})
    halves = len(parts) // experts
    if pair.a.shape[0] % experts or pair.b.shape[1] % experts or pair.b.shape[0] % halves:
        return {}
    each = list(of_each(adapter.values(pair.a), adapter.values(pair.b), experts))
    expected = {}
    for number, part in enumerate(parts):
        a, b = each[part.expert[0]]
        expected[part.expert] = _on_this_rank(a, np.split(b, halves)[number % halves], pair.scaling, part)
    return expected


def placement(adapter: Adapter, pair: AdapterModule, home: Home) -> Placement | None:
    """The expected contents of the slice on this rank; None for half a pair, or if its tensors are not matrices."""
    if pair.a is None or pair.b is None or len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return None
    return _on_this_rank(adapter.values(pair.a), adapter.values(pair.b), pair.scaling, home)


def _on_this_rank(a: Floats, b: Floats, scaling: float, home: Home) -> Placement:
    layer = home.layer
    if home.routes:
        name = "w2" if home.expert[1] == W2 else "w13"
        a, b = (
            getattr(layer, f"_slice_{name}_{half}")(torch.from_numpy(values)[None])[0].contiguous().numpy()
            for half, values in (("a", a), ("b", b))
        )
        return Placement(a, b, scaling)
    # An embedding, a head and experts that are distributed have A and B whole on every rank.
    if getattr(layer, "tp_size", 1) > 1 and isinstance(layer, seams.linear_layer):
        tensors: list[Any] = [torch.from_numpy(a), torch.from_numpy(b)]
        if home.slices > 1:
            empty: list[Any] = [None] * home.slices
            lists = [[*empty[: home.slice], tensor, *empty[home.slice + 1 :]] for tensor in tensors]
            tensors = [
                layer.slice_lora_a(lists[0])[home.slice],
                layer.slice_lora_b(lists[1])[home.slice],
            ]
        else:
            tensors = [layer.slice_lora_a(tensors[0]), layer.slice_lora_b(tensors[1])]
        a, b = (np.ascontiguousarray(tensor.numpy()) for tensor in tensors)
    return Placement(a, b, scaling)


def slot_values(home: Home, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and s·B in the slot, with padding; None for a layer that keeps them elsewhere."""
    views = slot_views(home, slot)
    return None if views is None else (views[0].cpu(), views[1].cpu())


def slot_views(home: Home, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same as views of the layer's own tensors: to write into them is to change what the engine multiplies with."""
    stacked_a, stacked_b = (getattr(home.layer, name, None) for name in ("lora_a_stacked", "lora_b_stacked"))
    if home.routes:
        expert, part = home.expert
        name, index = ("w2", 0) if part == W2 else ("w13", part // 2)
        a, b = (getattr(home.layer, f"{name}_lora_{half}_stacked")[index][slot, expert] for half in "ab")
        return a, b
    if isinstance(stacked_a, torch.Tensor) and isinstance(stacked_b, torch.Tensor):
        # An embedding keeps A by token, `[slots, vocabulary, r]`; a head as linear layers do.
        a = stacked_a[slot].T if stacked_a.ndim == 3 else stacked_a[slot, 0]
        return a, stacked_b[slot, 0]
    if not isinstance(stacked_a, tuple) or len(stacked_a) != home.slices:
        return None
    return stacked_a[home.slice][slot, 0], stacked_b[home.slice][slot, 0]  # type: ignore[index]


def judge_fused(
    expected: Mapping[tuple[int, int], Placement], home: Home, slot: int, moment: str, source: str
) -> Finding:
    """`placed` of a pair of fused experts: every slice, with the numbers of the experts that differ."""
    findings = {part.expert: judge(expected.get(part.expert), part, slot, moment, source) for part in home.parts}
    wrong = {expert for (expert, _), finding in findings.items() if finding != OK}
    if not wrong:
        return OK
    first = next(finding for finding in findings.values() if finding != OK)
    return replace(first, message=f"experts {ranges(sorted(wrong))}: {first.message}")


def judge(expected: Placement | None, home: Home, slot: int, moment: str, source: str) -> Finding:
    """`placed`: the slot, with padding, compared with the values expected from `source`: the file, or the pushed
    tensors (None for half a pair)."""
    held = slot_values(home, slot)
    if held is None:
        return not_measured(f"the slots of {type(home.layer).__name__} are not read yet")
    a, b = expected.replayed(held[0].dtype) if expected is not None else (None, None)
    if not (held[0].any() and held[1].any()) and (a is None or b is None or (a.any() and b.any())):
        return placed_empty(moment)
    if a is None or b is None:
        return placed_differs("its slot", float("inf"), moment, source)
    for half, tensor, slot_tensor in (("lora_A", a, held[0]), ("s·lora_B", b, held[1])):
        if tensor.shape[0] > slot_tensor.shape[0] or tensor.shape[1] > slot_tensor.shape[1]:
            return placed_differs(half, float("inf"), moment, source)
        padded = torch.zeros_like(slot_tensor)
        padded[: tensor.shape[0], : tensor.shape[1]] = tensor
        if (difference := relative_difference(slot_tensor, padded)) is not None:
            return placed_differs(half, difference, moment, source)
    return OK
