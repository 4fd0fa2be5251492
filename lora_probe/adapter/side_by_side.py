"""Two adapters side by side: what is the same, what differs, and how.

In: two `Adapter`s. Out: an `AdapterDiff`: for each module the `Relation` of its ΔW and what it means, the fields of the
configs that differ, and what only one of the two has. Pairs are compared from their factors; the values of A and B
decide where they are equal bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_probe.adapter.checkpoint import Adapter, AdapterModule, open_adapter
from lora_probe.adapter.pair_values import pair_values
from lora_probe.adapter.relation import Relation, relate
from lora_probe.adapter.spectrum import LARGE, Array
from lora_probe.errors import UnreadableFile
from lora_probe.files import shown
from lora_probe.files.limits import step
from lora_probe.names import Key, natural, path_of
from lora_probe.precision import rounding
from lora_probe.presented import Presented

Kind = Literal["identical", "same", "multiple", "elsewhere", "transposed", "moved", "same start", "unrelated", "unread"]
"""`identical`: A, B and scaling are equal. `same`: ΔW is, up to rounding. `multiple`: ΔW is a multiple. `elsewhere`: A
and B are those of another module. `transposed`: A and B are exchanged. `moved`: both subspaces are shared, as after
more training. `same start`: A spans the same rows, and B is another. `unread`: A and B are no pair, or too large."""

SLACK = 8.0
"""Units of round-off of the stored dtype by which rounding may change ΔW, relative to its norm."""
LEAST = 1e-6
"""The same for float32, in which the order of summing matters more."""
CLEAR = 2.0
"""A factor is one if it changes ΔW that many times as much as what it leaves unexplained."""
SHARED = 0.5
"""From this share on (above chance), two subspaces count as the same."""


@dataclass(frozen=True)
class ModulePair:
    """One module of both adapters. `relation` is None if it was not computed; `source` is the module of the other
    adapter whose A and B the second one has here."""

    first: AdapterModule
    second: AdapterModule
    kind: Kind
    relation: Relation | None = None
    source: Key | None = None
    why: str = ""

    @property
    def key(self) -> Key:
        return self.first.key

    @property
    def factor(self) -> float | None:
        """What ΔW of the first one is multiplied with; None unless it is a multiple."""
        return self.relation.factor if self.relation is not None and self.kind == "multiple" else None


@dataclass(frozen=True, repr=False)
class AdapterDiff(Presented):
    """Two adapters. `fields` are the fields of the configs that differ, with both values (None: absent). `unshared` are
    the modules, and `other_tensors` the names of tensors other than A and B, that only one has or that differ."""

    first: Adapter
    second: Adapter
    modules: tuple[ModulePair, ...]
    fields: tuple[tuple[str, Any, Any], ...]
    unshared: tuple[tuple[Key, ...], tuple[Key, ...]]
    other_tensors: tuple[str, ...]

    def of_kind(self, *kinds: Kind) -> tuple[ModulePair, ...]:
        return tuple(pair for pair in self.modules if pair.kind in kinds)

    @property
    def same(self) -> bool:
        """Whether both change a model in the same way, as far as A and B decide."""
        alike = len(self.of_kind("identical", "same")) == len(self.modules) > 0
        return alike and not any(self.unshared) and not self.other_tensors

    def differs_in(self, field: str) -> bool:
        return any(name == field for name, _, _ in self.fields)


def diff(first: str | Path, second: str | Path) -> AdapterDiff:
    """How two adapter folders differ: `lora_probe.diff("checkpoint-100", "checkpoint-200")`.

    Raises:
        ProbeError: as `inspect` does.
    """
    return side_by_side(open_adapter(first), open_adapter(second))


def side_by_side(first: Adapter, second: Adapter, advance: Callable[[], None] = lambda: None) -> AdapterDiff:
    """Compare two adapters; `advance` is called after each module.

    Raises:
        UnreadableFile: the values of a tensor cannot be read.
    """
    here, there = first.by_key(), second.by_key()
    pairs = []
    for key in _sorted(here.keys() & there.keys()):
        pairs.append(_compared(first, here[key], second, there[key]))
        advance()
    return AdapterDiff(
        first,
        second,
        tuple(_moved_elsewhere(first, second, pairs)),
        tuple(_fields(first.config.raw, second.config.raw)),
        (_sorted(here.keys() - there.keys()), _sorted(there.keys() - here.keys())),
        tuple(_other_tensors(first, second)),
    )


def _sorted(keys: set[Key]) -> tuple[Key, ...]:
    return tuple(sorted(keys, key=lambda key: natural(path_of(key))))


def _compared(first: Adapter, one: AdapterModule, second: Adapter, two: AdapterModule) -> ModulePair:
    step(f"comparing {shown(one.stored_as)}", first.weights.path)
    if why := _why_unread(one) or _why_unread(two):
        return ModulePair(one, two, "unread", why=why)
    if _shape(one) != _shape(two):
        why = f"ΔW is {_times(_shape(one))} in the first, {_times(_shape(two))} in the second"
        return ModulePair(one, two, "unread", why=why)
    try:
        (a1, b1), (a2, b2) = _matrices(first, one), _matrices(second, two)
    except UnreadableFile as error:
        return ModulePair(one, two, "unread", why=error.message)
    relation = relate((a1, b1, one.scaling), (a2, b2, two.scaling))
    if one.scaling == two.scaling and np.array_equal(a1, a2) and np.array_equal(b1, b2):
        return ModulePair(one, two, "identical", relation)
    if not relation.finite:
        return ModulePair(one, two, "unread", relation, why="A or B holds NaN or infinity")
    return ModulePair(one, two, _kind(relation, one, two), relation)


def _why_unread(pair: AdapterModule) -> str:
    if pair.a is None or pair.b is None or not (pair.matrices or pair.convolution):
        return "A and B are not a pair"
    return "A and B are too large" if pair.a.parameters + pair.b.parameters > LARGE else ""


def _shape(pair: AdapterModule) -> tuple[int, int]:
    """`(out, in)` of ΔW; of a convolution with its kernel as part of `in`."""
    assert pair.a is not None
    assert pair.b is not None
    return pair.b.shape[0] * pair.blocks[1], pair.a.parameters // pair.a.shape[0] * pair.blocks[0]


def _times(shape: tuple[int, int]) -> str:
    return "×".join(map(str, shape))


def _matrices(adapter: Adapter, pair: AdapterModule) -> tuple[Array, Array]:
    """A and B as matrices: of a convolution, with all axes but the first as one."""
    a, b = pair_values(adapter, pair)
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _kind(relation: Relation, one: AdapterModule, two: AdapterModule) -> Kind:
    dtypes = [{tensor.dtype for tensor in (pair.a, pair.b) if tensor is not None} for pair in (one, two)]
    rounded = max(LEAST, SLACK * max(rounding(dtype).round_off for dtype in dtypes[0] | dtypes[1]))
    # Two files of one dtype have had no rounding between them.
    if relation.distance <= (LEAST if dtypes[0] == dtypes[1] else rounded) * max(relation.norms):
        return "same"
    factor = relation.factor
    if factor and relation.rest <= rounded and abs(factor - 1) > CLEAR * relation.rest:
        return "multiple"
    if relation.shared_rows >= SHARED:
        return "moved" if relation.shared_columns >= SHARED else "same start"
    return "unrelated"


def _moved_elsewhere(first: Adapter, second: Adapter, pairs: list[ModulePair]) -> Iterator[ModulePair]:
    """The pairs, those that differ with the module whose A and B they have, or that have them exchanged."""
    open_pairs = [pair for pair in pairs if pair.kind in ("moved", "same start", "unrelated", "multiple")]
    owners = {digest: pair.key for pair in open_pairs for digest in [_digest(*_matrices(first, pair.first))]}
    for pair in pairs:
        if pair not in open_pairs:
            yield pair
            continue
        a, b = _matrices(second, pair.second)
        source = owners.get(_digest(a, b))
        if source is not None and source != pair.key:
            yield ModulePair(pair.first, pair.second, "elsewhere", pair.relation, source)
        elif owners.get(_digest(np.ascontiguousarray(b.T), np.ascontiguousarray(a.T))) == pair.key:
            yield ModulePair(pair.first, pair.second, "transposed", pair.relation)
        else:
            yield pair


def _digest(a: Array, b: Array) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for half in (a, b):
        digest.update(repr(half.shape).encode())
        digest.update(np.ascontiguousarray(half).data)
    return digest.digest()


def _fields(first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    """The fields of two configs that differ; the order of a list of names does not count."""
    for name in sorted({*first, *second}):
        one, two = first.get(name), second.get(name)
        if _unordered(one) != _unordered(two):
            yield name, one, two


def _unordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value


def _other_tensors(first: Adapter, second: Adapter) -> Iterator[str]:
    """The tensors that are no A or B of a pair and differ, or are in one file only."""
    here, there = _others(first), _others(second)
    for name in sorted({*here, *there}, key=natural):
        if name not in here or name not in there or _differ(first, second, here[name], there[name]):
            yield name


def _others(adapter: Adapter) -> dict[str, Any]:
    extras = [extra for module in adapter.modules for extra in module.extras]
    return {tensor.name: tensor for tensor in (*extras, *(other.tensor for other in adapter.others))}


def _differ(first: Adapter, second: Adapter, one: Any, two: Any) -> bool:
    if one.shape != two.shape:
        return True
    try:
        return not np.array_equal(first.values(one), second.values(two), equal_nan=True)
    except UnreadableFile:
        return bool(one.dtype != two.dtype)
