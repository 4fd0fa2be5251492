"""What two adapters side by side come to, in one sentence.

In: an `AdapterDiff`. Out: the sentence, and one clause for each group of modules that differ in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lora_probe.adapter.side_by_side import AdapterDiff, Kind, ModulePair, coarser_of
from lora_probe.files import shown
from lora_probe.names import in_words, name_modules, path_of
from lora_probe.precision import factor_text, same_factor

SCALING = ("lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern")
"""The fields of a config that decide the scaling."""
BASE = "base_model_name_or_path"
LONGEST = 200
MOST_LETTERS = 300
"""The longest list of modules in the sentence."""
MOST_GROUPS = 4
"""Ways in which modules differ that are told; of several hundred factors the table has the rest."""
SHOWN = 3
"""Modules that have those of another one, by name."""


@dataclass(frozen=True)
class Group:
    """Modules that differ in the same way; those of kind `multiple` by the same `factor`."""

    kind: Kind
    pairs: tuple[ModulePair, ...]
    factor: float | None = None


def groups(diff: AdapterDiff) -> tuple[Group, ...]:
    """The modules by how they differ, the most first."""
    by_kind: dict[tuple[Kind, float | None], list[ModulePair]] = {}
    for pair in diff.modules:
        kinds = [factor for kind, factor in by_kind if kind == pair.kind]
        known = next((factor for factor in kinds if _alike_factors(factor, pair.factor)), pair.factor)
        by_kind.setdefault((pair.kind, known), []).append(pair)
    ordered = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    return tuple(Group(kind, tuple(pairs), factor) for (kind, factor), pairs in ordered)


def _alike_factors(one: float | None, two: float | None) -> bool:
    return one == two or (one is not None and two is not None and same_factor(one, two))


def verdict(diff: AdapterDiff) -> str:
    """The sentence."""
    parts = [_of_modules(diff)]
    if unread := diff.of_kind("unread"):
        reasons = dict.fromkeys(pair.why for pair in unread)
        parts.append(f"{_modules(len(unread))} not compared ({_named(unread)}): {', '.join(reasons)}")
    for side, keys in zip(("first", "second"), diff.unshared, strict=True):
        if keys:
            names = shown(name_modules(map(path_of, keys)), MOST_LETTERS)
            parts.append(f"{_modules(len(keys))} only in the {side}: {names}")
    if diff.other_tensors:
        tensors = [shown(name, LONGEST) for name in diff.other_tensors[:2]]
        more = f" and {len(diff.other_tensors) - 2} more" if len(diff.other_tensors) > 2 else ""
        parts.append(f"other tensors differ: {', '.join(tensors)}{more}")
    parts += _of_configs(diff)
    return "; ".join(parts)


def _of_configs(diff: AdapterDiff) -> Iterator[str]:
    """What the configs and the dtypes add."""
    dtypes = [", ".join(adapter.dtypes) for adapter in (diff.first, diff.second)]
    if dtypes[0] != dtypes[1]:
        yield f"stored in {dtypes[1]} instead of {dtypes[0]}"
    if diff.applied:
        yield f"the configs differ in {in_words(list(diff.applied))}, which decides what is adapted and how"
    if diff.differs_in(BASE) and diff.modules:
        bases = (adapter.config.base_model for adapter in (diff.first, diff.second))
        one, two = ("none" if base is None else shown(base, LONGEST) for base in bases)
        yield f"the configs name different base models: {one} and {two}"


def _of_modules(diff: AdapterDiff) -> str:
    total = len(diff.modules)
    found = [group for group in groups(diff) if group.kind != "unread"]
    if not found:
        return "no module in common" if not total else "no module could be compared"
    differing = [group for group in found if group.kind not in ("identical", "same")]
    if not differing:
        return _alike(diff, found)
    if len(found) == 1:
        return _whole(diff, found[0])
    changed = sum(len(group.pairs) for group in differing)
    first = f"all {total} modules differ" if changed == total else f"{changed} of {_modules(total)} "
    first += "" if changed == total else "differs" if changed == 1 else "differ"
    if len(differing) == 1:
        (group,) = differing
        return f"{first}: {_named(group.pairs)} {_clause(diff, group)}"
    told = [f"{_clause(diff, group)}: {_named(group.pairs)}" for group in differing[:MOST_GROUPS]]
    more = len(differing) - MOST_GROUPS
    return f"{first}: {'; '.join(told)}{f'; and in {more} other ways' if more > 0 else ''}"


def _alike(diff: AdapterDiff, found: Sequence[Group]) -> str:
    """All modules that were compared have the same ΔW."""
    count = sum(len(group.pairs) for group in found)
    every = _all(count) if count == len(diff.modules) else _modules(count)
    if {group.kind for group in found} == {"identical"}:
        equal = f"A, B and the scaling are equal in {every}"
        return f"the same adapter: {equal}" if diff.same else equal
    ranks = [(pair.first.rank, pair.second.rank) for pair in diff.modules if pair.first.rank != pair.second.rank]
    how = f", at rank {ranks[0][1]} instead of {ranks[0][0]}" if ranks else ""
    rounded = [pair for group in found if group.kind == "same" for pair in group.pairs]
    if len(rounded) < count:
        return f"the same ΔW in {every}, in {len(rounded)} of them within rounding: {_named(rounded)}"
    dtype = coarser_of(*(half for pair in diff.modules for half in (pair.first, pair.second)))
    return f"the same ΔW in {every}{how}" if how else f"the same ΔW in {every}, within the rounding of {dtype}"


def _whole(diff: AdapterDiff, group: Group) -> str:
    """All modules are related in one way."""
    every = _all(len(group.pairs))
    match group.kind:
        case "moved":
            return f"one looks like the other after more training: ΔW moved by {_range(group)} in {every}"
        case "nested":
            return f"the subspaces of one are part of the other's: rank {_ranks(group)} in {every}"
        case "same start":
            return f"trained apart from the same initial A: {every} have much the same A, and another B"
        case "unrelated":
            return f"unrelated: {every} have no more in common than those of two random adapters"
        case "multiple":
            return f"the same weights in {every}, {_clause(diff, group)}"
        case "elsewhere":
            return f"A and B of {every} are those of other modules: {_elsewhere(group)}"
        case "transposed":
            return f"A and B are exchanged in {every} (ΔW is transposed)"
    return f"{every} are {_clause(diff, group)}"


def _clause(diff: AdapterDiff, group: Group) -> str:
    """How some modules differ, without their names."""
    match group.kind:
        case "multiple":
            return _multiple(diff, group)
        case "elsewhere":
            return f"with A and B of other modules ({_elsewhere(group)})"
        case "transposed":
            return "with A and B exchanged (ΔW is transposed)"
        case "moved":
            return f"moved by {_range(group)}, as after more training"
        case "nested":
            return f"with one's subspaces as part of the other's (rank {_ranks(group)})"
        case "same start":
            return "with much the same A and another B"
        case "zero":
            return _zero(group)
    return "unrelated"


def _zero(group: Group) -> str:
    sides = {"first" if not (pair.relation and pair.relation.norms[0]) else "second" for pair in group.pairs}
    return f"zero in the {' or the '.join(sorted(sides))}, where nothing was trained or the scaling is 0"


def _elsewhere(group: Group) -> str:
    sources = [(pair, path_of(pair.source)) for pair in group.pairs if pair.source is not None]
    moves = [f"{_named([pair])} has A and B of {name_modules([source])}" for pair, source in sources]
    return ", ".join(moves[:SHOWN]) + (f" and {len(moves) - SHOWN} more" if len(moves) > SHOWN else "")


def _multiple(diff: AdapterDiff, group: Group) -> str:
    """`at 4 times the scaling in the second (lora_alpha 64 instead of 16)`."""
    pair = group.pairs[0]
    before, after = pair.first.scaling, pair.second.scaling
    ratio = after / before if before else None
    if before != after and (group.factor is None or ratio is None or _alike_factors(ratio, group.factor)):
        fields = [field for field in diff.fields if field[0] in SCALING]
        reasons = [f"{name} {_value(two)} instead of {_value(one)}" for name, one, two in fields]
        why = f" ({', '.join(reasons)})" if reasons else ""
        times = f"{factor_text(ratio)} times the scaling" if ratio else f"the scaling {after:g} instead of {before:g}"
        return f"at {times} in the second{why}"
    if group.factor is not None and _alike_factors(group.factor, -1.0):
        return "with the other sign"
    return f"at {factor_text(group.factor or 0.0)} times ΔW of the first"


def _range(group: Group) -> str:
    """How far modules moved: `2.2 % to 4.8 %`."""
    shares = [pair.share for pair in group.pairs if pair.share is not None]
    low, high = (f"{share:.2g}" if share >= 1 else f"{100 * share:.2g} %" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _ranks(group: Group) -> str:
    pair = group.pairs[0]
    return f"{pair.first.rank} and {pair.second.rank}"


def _named(pairs: Sequence[ModulePair]) -> str:
    return shown(name_modules([path_of(pair.key) for pair in pairs]), MOST_LETTERS)


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _all(count: int) -> str:
    return f"all {count} modules" if count > 1 else "the only module"


def _value(value: Any) -> str:
    return shown(value if isinstance(value, str) else json.dumps(value), LONGEST)
