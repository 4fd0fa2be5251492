"""Names of modules: keys, prefixes, layers, and short texts for many paths.

In: paths of modules as Transformers names them. Out: their layer, their projection, a sort key, or a short text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

T = TypeVar("T", bound=Hashable)
Key = tuple[str, str, int | None]
"""(module path in the base model, parameter, expert or None): the name of a module in all of lora-probe."""

PREFIX = "base_model.model."

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""Projections in the order of a layer."""

LAYER = re.compile(r"(?:^|\.)([0-9]{1,9})\.")


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key for paths in the order of computing: layer 2 before layer 10, attention before mlp, q before k."""
    return [_place(part) for part in name.split(".")]


_EARLY = ("embed_tokens", "self_attn", "self_attention", "attention", "attn", *PROJECTIONS)


def _place(part: str) -> tuple[int, int, str]:
    # Not `isdigit`: `int` does not accept all digits of other alphabets, nor thousands of digits.
    if part.isdecimal() and len(part) < 20:
        return 1, int(part), ""
    return 0, _EARLY.index(part) if part in _EARLY else len(_EARLY) + (part == "lm_head"), part


def layer_of(module: str) -> int | None:
    """The layer number in a module's path: its first number."""
    match = LAYER.search(module)
    return int(match[1]) if match else None


def projection_of(module: str) -> str:
    """The last word of a module's path, with the number if it has one: `q_proj`, `to_out.0`."""
    before, _, last = module.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdecimal() and before else last


def ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def path_of(key: Key) -> str:
    """A key as one text: the path, with the parameter unless it is the weight, and with the expert if there is one."""
    module, parameter, expert = key
    path = module if parameter == "weight" else f"{module}.{parameter}"
    return path if expert is None else f"{path}[{expert}]"


class ShortName(NamedTuple):
    """A module by as much of its path as tells it from all others.

    `words` state what `numbers` count, the layers first: `encoder layers` and `experts` for (3, 7). A module outside of
    all layers has neither, and its whole path as `name`.
    """

    numbers: tuple[int, ...]
    words: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class Universe:
    """The modules among which a short name is unique. They are shortened when the first of them is named."""

    paths: tuple[str, ...]

    @cached_property
    def names(self) -> Mapping[str, ShortName]:
        return short_names(self.paths)


def name_modules(modules: Iterable[str], universe: Universe | None = None) -> str:
    """Module paths as a short text: `layer 5 q_proj, k_proj`, `encoder layers 0-11 q_proj`, `layers 0-3 experts 0-7
    up_proj`. No other module of `universe` has the same text; without it, no other one of `modules`."""
    paths = list(dict.fromkeys(modules))
    names = universe.names if universe is not None else {}
    if not all(path in names for path in paths):
        names = short_names((*names, *paths))
    return in_text(names[path] for path in paths)


def in_text(names: Iterable[ShortName]) -> str:
    """Short names as one text, each once: names with the same numbers share them."""
    return _in_text([(name.numbers, name.words, name.name) for name in dict.fromkeys(names)], "; ", loose_last=True)


def in_layer(name: ShortName) -> ShortName:
    """The name of a module in its layer: `self_attn.q_proj`, `experts 3 up_proj`."""
    return ShortName(name.numbers[1:], name.words[1:], name.name)


def _in_text(
    names: Sequence[tuple[tuple[int, ...], tuple[str, ...], str]], between: str, *, loose_last: bool = False
) -> str:
    loose = _folded([name for _, words, name in names if not words])
    counted: dict[str, dict[int, list[tuple[tuple[int, ...], tuple[str, ...], str]]]] = {}
    for numbers, words, name in names:
        if words:
            counted.setdefault(words[0], {}).setdefault(numbers[0], []).append((numbers[1:], words[1:], name))
    parts = []
    for word, by_number in counted.items():
        by_text: dict[str, list[int]] = {}
        for number, members in by_number.items():
            by_text.setdefault(_in_text(members, ", "), []).append(number)
        parts += [f"{one_or_more(word, len(numbers))} {ranges(numbers)} {text}" for text, numbers in by_text.items()]
    return between.join([*parts, *loose] if loose_last else [*loose, *parts])


def _folded(names: Sequence[str]) -> list[str]:
    """Names that differ only in the expert at their end as one name: `down_proj[0-2, 5]`."""
    experts: dict[tuple[str, bool], list[int]] = {}
    for name in names:
        stem, number = _stem(name)
        # A name and the same name with an expert are two modules.
        experts.setdefault((stem, number is None), []).extend([] if number is None else [number])
    return [f"{stem}[{ranges(numbers)}]" if numbers else stem for (stem, _), numbers in experts.items()]


def _stem(name: str) -> tuple[str, int | None]:
    """A name without its expert, and the number of the expert."""
    match = _EXPERT.fullmatch(name)
    return (match["stem"], int(match["expert"])) if match else (name, None)


def one_or_more(word: str, count: int) -> str:
    """`layer` or `layers`. Names in a path stay as they are."""
    return word.removesuffix("s") if count == 1 and word.split(" ")[-1] == LAYERS else word


def short_names(paths: Iterable[str]) -> dict[str, ShortName]:
    """The short name of each path, unique among them. The time is linear in the number of paths."""
    divided = {path: _divided(path) for path in paths}
    patterns: dict[_Pattern, tuple[int, ...]] = {}
    counting: set[_Pattern] = set()
    for pattern, numbers in divided.values():
        first = patterns.setdefault(pattern, numbers)
        # A number that is the same in all paths of a pattern, such as `layer.1` in the blocks of T5, counts nothing.
        counting |= {pattern[: at + 1] for at in range(1, len(numbers)) if numbers[at] != first[at]}
    towers = _tower_names(sorted({pattern[0] for pattern in patterns if len(pattern) > 1}))
    parts, kept = {}, {}
    for pattern, first in patterns.items():
        kept[pattern] = [at for at in range(len(first)) if not at or pattern[: at + 1] in counting]
        parts[pattern] = _parts(pattern, first, kept[pattern])
    words = _words(parts, towers)
    ends = _ends({pattern: (words[pattern], texts[-1]) for pattern, texts in parts.items()})
    return {
        path: ShortName(tuple(numbers[at] for at in kept[pattern]), words[pattern], ends[pattern])
        for path, (pattern, numbers) in divided.items()
    }


LAYERS = "layers"
_CONTAINERS = frozenset({LAYERS, "layer", "h", "block", "blocks", ""})
"""Names of lists of layers, all of which are called `layers` in texts."""
_COUNT = re.compile("0|[1-9][0-9]{0,8}")
_EXPERT = re.compile(r"(?P<stem>.+)\[(?P<expert>0|[1-9][0-9]{0,8})\]", re.DOTALL)
"""The name of an expert, as `path_of` writes it."""
_MOST_NUMBERS = 3
_DEEPEST = 8
"""The most parts of a path in a short name. If these are not unique, the name is the whole path in its layer."""
_Pattern = tuple[str, ...]
"""A path without the numbers that may count something: the texts before, between and after them."""


def _divided(path: str) -> tuple[_Pattern, tuple[int, ...]]:
    parts = path.split(".")
    texts: list[str] = []
    numbers: list[int] = []
    start = 0
    for at, part in enumerate(parts[:-1]):
        # A number directly after another one, or with a leading zero, counts nothing: it belongs to the name.
        if len(numbers) < _MOST_NUMBERS and (at > start or not numbers) and _COUNT.fullmatch(part):
            texts.append(".".join(parts[start:at]))
            numbers.append(int(part))
            start = at + 1
    return (*texts, ".".join(parts[start:])), tuple(numbers)


def _parts(pattern: _Pattern, numbers: Sequence[int], kept: Sequence[int]) -> tuple[str, ...]:
    """The texts of a pattern with the numbers that are not kept in them."""
    texts = [pattern[0]]
    for at, text in enumerate(pattern[1:]):
        if at in kept:
            texts.append(text)
        else:
            texts[-1] += f".{numbers[at]}.{text}"
    return tuple(texts)


def _words(parts: Mapping[_Pattern, tuple[str, ...]], towers: Mapping[str, str]) -> dict[_Pattern, tuple[str, ...]]:
    """What the numbers of each pattern count: the last word before each number, or all of them if those of two patterns
    are the same."""
    short, whole = {}, {}
    for pattern, (head, *texts) in parts.items():
        tower = (towers[head],) if texts else ()
        short[pattern] = (*tower, *map(projection_of, texts[:-1]))
        whole[pattern] = (*tower, *texts[:-1])
    alike = Counter((short[pattern], texts[-1]) for pattern, texts in parts.items())
    return {p: short[p] if alike[short[p], texts[-1]] == 1 else whole[p] for p, texts in parts.items()}


def _ends(names: Mapping[_Pattern, tuple[tuple[str, ...], str]]) -> dict[_Pattern, str]:
    """The shortest end of each name that is unique among the names with the same words. Directly in a layer it is
    unique in the whole layer: `shared_expert.up_proj` if there is `experts 0-7 up_proj`."""
    groups: dict[tuple[str, ...], dict[_Pattern, list[str]]] = {}
    for pattern, (words, name) in names.items():
        for group in {words, words[:1]} if words else ():
            groups.setdefault(group, {})[pattern] = name.split(".")
    ends = {pattern: name for pattern, (words, name) in names.items() if not words}
    for group, members in groups.items():
        for pattern, length in _shortest_ends(members).items():
            if names[pattern][0] == group:
                ends[pattern] = ".".join(members[pattern][-length:])
    return ends


def _tower_names(heads: Sequence[str]) -> dict[str, str]:
    """The name of each list of layers: `layers`; of several, `encoder layers` and `decoder layers`."""
    if len(heads) < 2:
        return {head: _container(head) for head in heads}
    parts = {head: head.split(".") for head in heads}
    # The heads are sorted, so what the first and the last share is shared by all.
    shared = 0
    for first, last in zip(parts[heads[0]], parts[heads[-1]], strict=False):
        if first != last:
            break
        shared += 1
    rests = {head: parts[head][shared:] for head in heads}
    names = {}
    for head, length in _shortest_ends({head: rest[::-1] for head, rest in rests.items()}).items():
        start = ".".join(rests[head][:length])
        names[head] = start if length >= len(rests[head]) else f"{start} {_container(head)}"
    # `layers` beside `encoder layers` would look like all layers.
    if _CONTAINERS & set(names.values()) or len(set(names.values())) < len(names):
        return {head: head or "top-level layers" for head in heads}
    return names


def _container(head: str) -> str:
    return LAYERS if projection_of(head) in _CONTAINERS else projection_of(head)


def _shortest_ends(names: Mapping[T, Sequence[str]]) -> dict[T, int]:
    """How many parts at the end of each name no other name ends with, all of them if there is no such end. None begins
    with a number."""
    lengths = {name: len(parts) for name, parts in names.items()}
    open_names = dict(names)
    for depth in range(1, _DEEPEST + 1):
        ends = Counter(tuple(parts[-depth:]) for parts in open_names.values())
        unique = [
            name
            for name, parts in open_names.items()
            if len(parts) <= depth or (ends[tuple(parts[-depth:])] == 1 and not parts[-depth].isdecimal())
        ]
        for name in unique:
            lengths[name] = min(depth, len(open_names.pop(name)))
    return lengths


def in_words(names: Sequence[str]) -> str:
    """Names in a sentence: `peft, vllm and another`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
