"""What two adapters side by side come to, in one sentence.

In: an `AdapterDiff`. Out: the sentence, and one clause for each group of modules that differ in the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lora_probe.adapter.side_by_side import AdapterDiff, Kind, ModulePair
from lora_probe.files import shown
from lora_probe.names import in_words, name_modules, path_of
from lora_probe.precision import factor_text

SAME_FACTOR = 2e-3
"""Factors that are closer than this are one factor."""
SCALING = ("lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern")
"""The fields of a config that decide the scaling."""
BASE = "base_model_name_or_path"
LONGEST = 200
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
        known = next((factor for factor in kinds if _alike(factor, pair.factor)), pair.factor)
        by_kind.setdefault((pair.kind, known), []).append(pair)
    ordered = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    return tuple(Group(kind, tuple(pairs), factor) for (kind, factor), pairs in ordered)


def _alike(one: float | None, two: float | None) -> bool:
    return one == two or (one is not None and two is not None and abs(one - two) <= SAME_FACTOR * abs(one))


def verdict(diff: AdapterDiff) -> str:
    """The sentence."""
    parts = [_of_modules(diff)]
    for side, keys in zip(("first", "second"), diff.unshared, strict=True):
        if keys:
            parts.append(f"{_modules(len(keys))} only in the {side}: {name_modules(map(path_of, keys))}")
    if diff.other_tensors:
        names = [shown(name, LONGEST) for name in diff.other_tensors[:2]]
        more = f" and {len(diff.other_tensors) - 2} more" if len(diff.other_tensors) > 2 else ""
        parts.append(f"other tensors differ: {', '.join(names)}{more}")
    if diff.differs_in(BASE) and diff.modules:
        one, two = ("none" if a.config.base_model is None else shown(a.config.base_model, LONGEST) for a in _both(diff))
        parts.append(f"the configs name different base models: {one} and {two}")
    return "; ".join(parts)


def _both(diff: AdapterDiff) -> tuple[Any, Any]:
    return diff.first, diff.second


def _of_modules(diff: AdapterDiff) -> str:
    total, found = len(diff.modules), groups(diff)
    if not found:
        return "no module in common"
    if len(found) == 1:
        return _whole(diff, found[0])
    alike = [group for group in found if group.kind in ("identical", "same")]
    others = [group for group in found if group not in alike]
    if not others:
        return f"the same ΔW in {_all(total)}{_how(diff)}"
    changed = sum(len(group.pairs) for group in others)
    clauses = "; ".join(_clause(diff, group, changed) for group in others)
    if {group.kind for group in others} == {"moved"} and alike:
        names = _named([pair for group in others for pair in group.pairs])
        return f"one continues the other's training (same subspaces): {changed} of {total} modules moved: {names}"
    if not alike:
        return f"all {total} modules differ: {clauses}"
    word = "differs" if changed == 1 else "differ"
    return f"{changed} of {_modules(total)} {word}: {clauses}"


def _whole(diff: AdapterDiff, group: Group) -> str:
    """All modules are related in one way."""
    every = _all(len(group.pairs))
    match group.kind:
        case "identical":
            fields = [name for name, _, _ in diff.fields if name != BASE]
            same = f"the same adapter: A, B and the scaling are equal in {every}"
            return f"{same}; the configs differ in {in_words(fields)}" if fields else same
        case "same":
            return f"the same ΔW in {every}{_how(diff)}"
        case "moved":
            return f"one continues the other's training (same subspaces): {every} moved"
        case "same start":
            return f"trained apart from the same initial A: {every} share the rows of A, and B is another one"
        case "unrelated":
            return f"unrelated: {every} share no more than two random adapters"
    return f"{_clause(diff, group, len(group.pairs))} in {every}"


def _clause(diff: AdapterDiff, group: Group, changed: int) -> str:
    """How some modules differ, with their names unless they are all that do."""
    whole = len(group.pairs) == len(diff.modules)
    named = "" if whole else f"{_named(group.pairs)} "
    match group.kind:
        case "multiple":
            return f"{named}{_multiple(diff, group)}" if whole else f"{named}at {_multiple(diff, group)}"
        case "elsewhere":
            return _elsewhere(group)
        case "transposed":
            return f"{named}with A and B exchanged (ΔW is transposed)"
        case "unread":
            reasons = dict.fromkeys(pair.why for pair in group.pairs)
            return f"{named}not compared: {'; '.join(reasons)}"
        case "same start":
            return f"{named}with the same rows of A and another B"
        case "moved":
            return f"{named}moved (same subspaces)"
    return f"{named}unrelated"


def _elsewhere(group: Group) -> str:
    sources = [(pair, path_of(pair.source)) for pair in group.pairs if pair.source is not None]
    moves = [f"{_named([pair])} has A and B of {name_modules([source])}" for pair, source in sources]
    return ", ".join(moves[:SHOWN]) + (f" and {len(moves) - SHOWN} more" if len(moves) > SHOWN else "")


def _multiple(diff: AdapterDiff, group: Group) -> str:
    """`the same weights, at 4 times the scaling in the second (lora_alpha 64 instead of 16)`."""
    assert group.factor is not None
    pair, factor = group.pairs[0], group.factor
    ratio = pair.second.scaling / pair.first.scaling if pair.first.scaling else 0.0
    whole = len(group.pairs) == len(diff.modules)
    if ratio != 1 and abs(ratio - factor) <= SAME_FACTOR * abs(factor):
        fields = [field for field in diff.fields if field[0] in SCALING]
        reasons = [f"{name} {_value(two)} instead of {_value(one)}" for name, one, two in fields]
        why = f" ({', '.join(reasons)})" if reasons else ""
        times = f"{factor_text(factor)} times the scaling"
        return f"the same weights, at {times} in the second{why}" if whole else f"{times} in the second{why}"
    if abs(factor + 1) <= SAME_FACTOR:
        return "the same weights with the other sign" if whole else "the other sign"
    times = f"{factor_text(factor)} times ΔW of the first"
    return f"the same weights, {times}" if whole else times


def _how(diff: AdapterDiff) -> str:
    """Why A and B are not equal although ΔW is."""
    ranks = {(pair.first.rank, pair.second.rank) for pair in diff.modules}
    dtypes = [", ".join(adapter.dtypes) for adapter in _both(diff)]
    if any(one != two for one, two in ranks):
        one, two = next((one, two) for one, two in sorted(ranks, key=str) if one != two)
        return f", at rank {two} instead of {one}"
    if dtypes[0] != dtypes[1]:
        return f", stored in {dtypes[1]} instead of {dtypes[0]}"
    return ", from other A and B"


def _named(pairs: Any) -> str:
    return name_modules([path_of(pair.key) for pair in pairs])


def _modules(count: int) -> str:
    return f"{count} module{'' if count == 1 else 's'}"


def _all(count: int) -> str:
    return f"all {count} modules" if count > 1 else "the only module"


def _value(value: Any) -> str:
    return shown(value if isinstance(value, str) else json.dumps(value), LONGEST)
