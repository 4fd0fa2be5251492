"""Words of module names that a file and its base model write differently: `attention` where the base has `self_attn`.

In: the pairs whose names are not modules of the base model, and the modules that have no pair. Out: a module for each
of these pairs, if exactly one renaming of words gives every pair a module that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import product
from math import prod

from lora_probe.adapter import AdapterModule
from lora_probe.base import Shapes
from lora_probe.names import Key
from lora_probe.rules.lp3_shapes import shape_differs
from lora_probe.rules.paths import bare, from_number_on

MOST_PATTERNS = 100
"""The most kinds of modules (paths without their numbers) that are compared. Real adapters have fewer than thirty."""
MOST_RENAMINGS = 10_000
"""Limit for the renamings that are tried."""

Pattern = tuple[str, ...]
"""The words of a path, `#` for each number."""
_Numbers = tuple[str, ...]
_Word = tuple[int, str]
"""A word, and how far behind the last number of its path it is: 0 in front of it, -1 in a path without numbers."""


@dataclass(frozen=True)
class _Kind:
    """The pairs of the file whose paths differ only in their numbers, and the places of words that the base lacks."""

    pattern: Pattern
    pairs: Mapping[_Numbers, tuple[Key, AdapterModule]]
    unknown: tuple[int, ...]


def renamed_homes(
    pairs: Mapping[Key, AdapterModule], vacant: Set[str], shapes: Shapes, is_named: Callable[[str], bool]
) -> dict[Key, str]:
    """The module that each of `pairs` was meant for, of the modules `vacant` of a base with `shapes`.

    Only words that no module of the base has at that place are renamed, each to the same word everywhere, and no two to
    the same word. There is no result if a pair finds no module, does not fit its shape, or if another renaming is
    possible. The last word is renamed only to one that target_modules names (`is_named`). Whole paths are compared
    first, then paths from the layer's number on: the part before it may differ as well.
    """
    if not pairs or not vacant:
        return {}
    words = {word for name in shapes for word in _placed(name.split("."))}
    named = {name for name in vacant if is_named(name)}
    for whole in (True, False):
        for modules in (named, vacant):
            if modules is named or all(_placed(bare(key[0]).split("."))[-1] in words for key in pairs):
                homes = _renaming(pairs, modules, shapes, words, whole)
                if homes:
                    return homes
    return {}


def _renaming(
    pairs: Mapping[Key, AdapterModule], vacant: Set[str], shapes: Shapes, words: Set[_Word], whole: bool
) -> dict[Key, str]:
    free: dict[Pattern, dict[_Numbers, str | None]] = {}
    for name in sorted(vacant):
        pattern, numbers = _pattern(name, whole)
        # Two towers of the base may have layers with the same names.
        same = free.setdefault(pattern, {})
        same[numbers] = None if numbers in same else name
    kinds: dict[Pattern, dict[_Numbers, tuple[Key, AdapterModule]]] = {}
    for key, pair in pairs.items():
        pattern, numbers = _pattern(bare(key[0]), whole)
        if numbers in kinds.setdefault(pattern, {}):
            return {}
        kinds[pattern][numbers] = key, pair
    if max(len(kinds), len(free)) > MOST_PATTERNS:
        return {}
    asked = [
        _Kind(pattern, members, tuple(i for i, word in enumerate(_placed(pattern)) if word not in words))
        for pattern, members in kinds.items()
    ]
    choices = [[pattern for pattern in free if _may_be(kind, pattern, free[pattern], shapes)] for kind in asked]
    if not 0 < prod(map(len, choices)) <= MOST_RENAMINGS:
        return {}
    renamings = [chosen for chosen in product(*choices) if _is_consistent(asked, chosen)]
    if len(renamings) != 1:
        return {}
    return {
        key: home
        for kind, pattern in zip(asked, renamings[0], strict=True)
        for numbers, (key, _) in kind.pairs.items()
        if (home := free[pattern][numbers]) is not None
    }


def _placed(words: Sequence[str]) -> list[_Word]:
    last = max((i for i, word in enumerate(words) if word == "#" or word.isdecimal()), default=None)
    if last is None:
        return [(-1, word) for word in words]
    return [(max(i - last, 0), "#" if word.isdecimal() else word) for i, word in enumerate(words)]


def _pattern(path: str, whole: bool) -> tuple[Pattern, _Numbers]:
    """The words of a path, or of its part from the first number on, and the numbers."""
    parts = path.split(".")
    if not whole:
        parts = from_number_on(parts)
    return tuple("#" if part.isdecimal() else part for part in parts), tuple(p for p in parts if p.isdecimal())


def _may_be(kind: _Kind, pattern: Pattern, modules: Mapping[_Numbers, str | None], shapes: Shapes) -> bool:
    """Whether all pairs of the kind would have a module of the right shape there, if the unknown words are renamed."""
    if len(pattern) != len(kind.pattern) or not kind.unknown:
        return False
    for place, (word, meant) in enumerate(zip(kind.pattern, pattern, strict=True)):
        if (place in kind.unknown and meant == "#") or (place not in kind.unknown and word != meant):
            return False
    for numbers, (_, pair) in kind.pairs.items():
        home = modules.get(numbers)
        shape = shapes[home] if home is not None else None
        if shape is None or shape_differs(pair, shape, transposed=False) is not None:
            return False
    return True


def _is_consistent(kinds: Sequence[_Kind], chosen: Sequence[Pattern]) -> bool:
    """Whether every word has one new word, and every new word and every pattern comes from one only."""
    meant: dict[str, str] = {}
    for kind, pattern in zip(kinds, chosen, strict=True):
        for place in kind.unknown:
            if meant.setdefault(kind.pattern[place], pattern[place]) != pattern[place]:
                return False
    return len(set(meant.values())) == len(meant) and len(set(chosen)) == len(chosen)
