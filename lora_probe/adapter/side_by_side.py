"""Two adapters side by side: what is the same, what differs, and how.

In: two `Adapter`s. Out: an `AdapterDiff`: for each module the `Relation` of its ΔW and what it means, the fields of the
configs that differ, and what only one of the two has. Pairs are compared from their factors; the values of A and B
decide where they are equal bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_probe.adapter.checkpoint import Adapter, AdapterModule, open_adapter
from lora_probe.adapter.pair_values import pair_values
from lora_probe.adapter.relation import Relation, relate
from lora_probe.adapter.spectrum import LARGE, Array
from lora_probe.adapter.variants import VARIANTS
from lora_probe.errors import UnreadableFile
from lora_probe.files import shown
from lora_probe.files.limits import step
from lora_probe.files.threads import on_all_processors
from lora_probe.names import Key, natural, path_of
from lora_probe.precision import FLOATS, rounding
from lora_probe.presented import Presented

Kind = Literal[
    "identical",
    "same",
    "multiple",
    "elsewhere",
    "transposed",
    "moved",
    "nested",
    "same start",
    "zero",
    "unrelated",
    "unread",
]
"""`identical`: A, B and scaling are equal. `same`: ΔW is, within the rounding of the files. `multiple`: ΔW is a
multiple. `elsewhere`: A and B are those of another module. `transposed`: A and B are exchanged. `moved`: ΔW points in
much the same direction, as after more training. `nested`: the subspaces of one are part of the other's, which has a
higher rank. `same start`: A is much the same, and B is another one. `zero`: ΔW is zero in one of them. `unread`: A and
B are no pair, too large, or not numbers."""

SLACK = 1.5
"""Units of round-off of the stored dtype by which rounding A and B changes ΔW, relative to its norm: 0.6 measured."""
LEAST = 1e-6
"""The same for float32, in which the order of summing matters more."""
CLEAR = 2.0
"""A factor is one if it changes ΔW that many times as much as what it leaves unexplained."""
ALIKE = 0.5
"""From this cosine or share on, two ΔW, two A or two subspaces count as related."""
INSIDE = 0.9
"""From this share on, a subspace is part of another."""
SURE, SIGMAS = 0.95, 3.0
"""The cosine of two random ΔW with one A has a standard deviation of 1 / sqrt(out·r); no more than SURE is needed."""
APPLIED = {variant.field for variant in VARIANTS} | {
    *("fan_in_fan_out", "alora_invocation_tokens", "bias", "target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "modules_to_save"),
}
"""Fields of a config that decide where and how A and B are applied, beside the scaling."""
MOVABLE = ("multiple", "moved", "nested", "same start", "unrelated")
"""What a pair may be that has A and B of another module."""
DIGESTED = 32
"""Rows and columns of a lattice of values, of each of A and B, that a digest is made of."""
COARSEST = 2.0**-3
"""The unit of round-off of F8_E5M2."""


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
    digests: tuple[bytes, bytes, bytes] = (b"", b"", b"")
    """Of some values of A and B of the first one, of the second one, and of the second one with A and B exchanged;
    empty for pairs that are equal or were not compared."""

    @property
    def alike(self) -> bool:
        return self.kind in ("identical", "same")

    @property
    def cosine(self) -> float | None:
        """That of both ΔW, without rounding if they are equal; None if one is zero, or was not computed."""
        cosine = self.relation.cosine if self.relation is not None else None
        return 1.0 if self.kind == "identical" and self.relation is not None else cosine

    @property
    def distance(self) -> float | None:
        """‖ΔW₂ - ΔW₁‖, without rounding if they are equal; None if it was not computed."""
        distance = self.relation.distance if self.relation is not None else None
        return 0.0 if self.kind == "identical" else distance

    @property
    def share(self) -> float | None:
        """‖ΔW₂ - ΔW₁‖ / ‖ΔW₁‖; None if ΔW₁ is zero, or was not computed."""
        if self.kind == "identical":
            return 0.0
        relation = self.relation
        return relation.distance / relation.norms[0] if relation is not None and relation.norms[0] > 0 else None

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
        """Whether both change a model in the same way."""
        alike = len(self.of_kind("identical", "same")) == len(self.modules) > 0
        return alike and not (any(self.unshared) or self.other_tensors or self.applied)

    @property
    def applied(self) -> tuple[str, ...]:
        """The fields of the configs that differ and decide how A and B are applied."""
        return tuple(name for name, _, _ in self.fields if name in APPLIED)

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
    unshared = _sorted(here.keys() - there.keys()), _sorted(there.keys() - here.keys())
    pairs = []
    both = _sorted(here.keys() & there.keys())
    for pair in on_all_processors(lambda key: _compared(first, here[key], second, there[key]), both):
        pairs.append(pair)
        advance()
    return AdapterDiff(
        first,
        second,
        tuple(_moved_elsewhere(first, second, pairs)),
        tuple(_fields(first.config.raw, second.config.raw)),
        unshared,
        tuple(_other_tensors(first, second)),
    )


def _sorted(keys: set[Key]) -> tuple[Key, ...]:
    return tuple(sorted(keys, key=lambda key: natural(path_of(key))))


def _compared(first: Adapter, one: AdapterModule, second: Adapter, two: AdapterModule) -> ModulePair:
    step(f"comparing {shown(one.stored_as)}", first.weights.path)
    if why := _why_unread(one) or _why_unread(two):
        return ModulePair(one, two, "unread", why=why)
    if _shape(one) != _shape(two):
        return ModulePair(one, two, "unread", why=f"ΔW is {_shape(one)} in the first, {_shape(two)} in the second")
    try:
        (a1, b1), (a2, b2) = _matrices(first, one), _matrices(second, two)
    except UnreadableFile as error:
        return ModulePair(one, two, "unread", why=error.message)
    relation, dtype = relate((a1, b1, one.scaling), (a2, b2, two.scaling)), coarser_of(one, two)
    equal = np.array_equal(a1, a2, equal_nan=True) and np.array_equal(b1, b2, equal_nan=True)
    if equal:
        return ModulePair(one, two, "identical" if one.scaling == two.scaling else "multiple", relation)
    if not relation.finite:
        numbers = all(np.isfinite(half).all() for half in (a1, b1, a2, b2))
        return ModulePair(one, two, "unread", relation, why="too large" if numbers else "A or B holds NaN or infinity")
    kind = _kind(relation, dtype, len(a2) * len(b2) if len(a1) == len(a2) else None)
    digests = _digest(a1, b1, dtype), _digest(a2, b2, dtype), _digest(b2.T, a2.T, dtype)
    return ModulePair(one, two, kind, relation, digests=digests)


def _why_unread(pair: AdapterModule) -> str:
    if pair.a is None or pair.b is None or not (pair.matrices or pair.convolution):
        return "A and B are not a pair"
    return "A and B are too large" if pair.a.parameters + pair.b.parameters > LARGE else ""


def _shape(pair: AdapterModule) -> str:
    """`out×in` of ΔW, of a convolution with its kernel."""
    assert pair.a is not None
    assert pair.b is not None
    sizes = [pair.b.shape[0] * pair.blocks[1], *pair.a.shape[1:]]
    sizes[1] *= pair.blocks[0]
    return "×".join(map(str, sizes))


def _matrices(adapter: Adapter, pair: AdapterModule) -> tuple[Array, Array]:
    """A and B as matrices: of a convolution, with all axes but the first as one."""
    a, b = pair_values(adapter, pair)
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def coarser_of(*pairs: AdapterModule) -> str:
    """The stored dtype that rounds most."""
    dtypes = {tensor.dtype for pair in pairs for tensor in (pair.a, pair.b) if tensor is not None}
    return max(sorted(dtypes), key=lambda dtype: _round_off(dtype))


def _kind(relation: Relation, dtype: str, sizes: int | None) -> Kind:
    """How two ΔW that were stored in `dtype`, or better, are related. `sizes` is out·r, None if the ranks differ."""
    rounded = max(LEAST, SLACK * _round_off(dtype))
    cosine, factor = relation.cosine, relation.factor
    if cosine is None:
        return "zero" if any(relation.norms) else "same"
    if factor and relation.rest <= rounded and abs(factor - 1) > max(CLEAR * relation.rest, LEAST):
        return "multiple"
    if relation.distance <= rounded * max(relation.norms):
        return "same"
    shared = [relation.shared_rows, relation.shared_columns]
    if sizes is None:
        inside = all(share is None or share >= INSIDE for share in shared) and any(shared)
        return "nested" if cosine >= ALIKE and inside else "moved" if cosine >= SURE else "unrelated"
    if cosine >= min(SURE, max(ALIKE, SIGMAS / np.sqrt(sizes))):
        return "moved"
    return "unrelated" if relation.start is None or relation.start < ALIKE else "same start"


def _moved_elsewhere(first: Adapter, second: Adapter, pairs: list[ModulePair]) -> Iterator[ModulePair]:
    """The pairs, those that differ with the module whose A and B they have, or that have them exchanged."""
    differing = {pair.key: pair for pair in pairs if pair.kind in MOVABLE and pair.digests[1]}
    if not differing:
        yield from pairs
        return
    dtype = max((coarser_of(pair.first, pair.second) for pair in differing.values()), key=_round_off)
    known = {pair.key: pair.digests[0] for pair in pairs if pair.digests[0]}
    owners: dict[bytes, AdapterModule] = {}
    for key, module in first.by_key().items():
        if not _why_unread(module):
            digest = known.get(key) or _digest(*_matrices(first, module), dtype)
            owners.setdefault(digest, module)
    for pair in pairs:
        owner = owners.get(pair.digests[1]) if pair.key in differing else None
        if owner is not None and owner.key != pair.key and _equal(first, owner, second, pair.second, dtype):
            yield replace(pair, kind="elsewhere", source=owner.key)
        elif pair.key in differing and pair.digests[2] == pair.digests[0] and _exchanged(first, second, pair, dtype):
            yield replace(pair, kind="transposed")
        else:
            yield pair


def _equal(first: Adapter, one: AdapterModule, second: Adapter, two: AdapterModule, dtype: str) -> bool:
    """Whether all values of A and B are equal as they are in `dtype`: digests are of some."""
    halves = zip(_matrices(first, one), _matrices(second, two), strict=True)
    return all(_same_values(here, there, dtype) for here, there in halves)


def _exchanged(first: Adapter, second: Adapter, pair: ModulePair, dtype: str) -> bool:
    (a1, b1), (a2, b2) = _matrices(first, pair.first), _matrices(second, pair.second)
    return _same_values(a1, b2.T, dtype) and _same_values(b1, a2.T, dtype)


def _same_values(here: Array, there: Array, dtype: str) -> bool:
    return np.array_equal(_stored(here, dtype), _stored(there, dtype), equal_nan=True)


def _round_off(dtype: str) -> float:
    """Of dtypes that are stored scaled, such as 8-bit floats, that of the coarsest."""
    return rounding(dtype).round_off if dtype in FLOATS else COARSEST


def _digest(a: Array, b: Array, dtype: str) -> bytes:
    """That of some values of both as they are when they are stored in `dtype`, so that a copy in another dtype has the
    same. They are those of a lattice, which is the same for a transposed matrix."""
    digest = hashlib.blake2b(digest_size=16)
    for half in (a, b):
        some = half[tuple(slice(None, None, max(1, size // DIGESTED)) for size in half.shape)]
        digest.update(repr(half.shape).encode())
        digest.update(np.ascontiguousarray(_stored(some, dtype)).data)
    return digest.digest()


def _stored(values: Array, dtype: str) -> Array:
    """Values rounded as in 16 bits, to the nearest and to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded: Array = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
        return rounded
    return values


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
