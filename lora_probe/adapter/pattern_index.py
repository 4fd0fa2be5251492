"""Names and patterns of a config, looked up instead of tried one after the other.

In: the keys of `rank_pattern` or `alpha_pattern`, in order. Out: a `PatternIndex` with the key that PEFT's
`get_pattern_key` returns for a module, and the keys that match none. A config may hold a hundred thousand names, most
of them plain: no operator but a dot, which matches any character, and `^` at the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_probe.errors import TooLarge
from lora_probe.files.regexes import Expressions

MOST_CHARACTERS = 200_000_000
"""Limit for the characters compared to find plain patterns with dots; a table with a path for each of 140,000 experts
needs a fifth of it."""

_ORDINARY = r"[^\\^$*+?{}\[\]|()\n]"
_ESCAPED = r"\\[!-/:-@\[-`{-~]"
_PLAIN = re.compile(rf"(\^?)({_ORDINARY}*(?:{_ESCAPED}{_ORDINARY}*)*)")
_PIECE = re.compile(r"\\?(.)")
_WORD = re.compile(r"[^\\^$*+?{}\[\]|()\n.]*")


@dataclass(frozen=True, slots=True)
class PlainPattern:
    """A pattern without operators. `dots` are the positions in `text` that match any character. With `whole` it matches
    only a whole path, otherwise also the end of one."""

    text: str
    dots: tuple[int, ...]
    whole: bool


def plain_pattern(pattern: str) -> PlainPattern | None:
    """The pattern as a `PlainPattern`; None for an expression with operators."""
    match = _PLAIN.fullmatch(pattern)
    if match is None:
        return None
    text = match[2]
    pieces: Sequence[str] = [piece[0] for piece in _PIECE.finditer(text)] if "\\" in text else text
    dots = tuple(place for place, piece in enumerate(pieces) if piece == ".")
    return PlainPattern("".join(piece[-1] for piece in pieces), dots, bool(match[1]))


def is_word(pattern: str) -> bool:
    """Whether an expression is a single part of a path, without operators and dots."""
    return _WORD.fullmatch(pattern) is not None


def ends(path: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    yield path
    begin = path.find(".") + 1
    while begin:
        yield path[begin:]
        begin = path.find(".", begin) + 1


def beginnings(path: str) -> Iterator[str]:
    """The path up to each dot: `a.b` and `a` for `a.b.c`."""
    end = path.rfind(".")
    while end >= 0:
        yield path[:end]
        end = path.rfind(".", 0, end)


def parts(path: str) -> list[str]:
    """The parts of a path that `(^|.*\\.)part($|\\..*)` matches. A dot does not match a newline, so nothing after a
    newline is a part, and the text right before it is one only if the path ends there."""
    head, newline, rest = path.partition("\n")
    names = head.split(".")
    return names[:-1] if newline and rest else names


_Table = dict[int, dict[tuple[int, ...], dict[str, int]]]
"""Length of a plain pattern -> positions of its dots -> its text -> its place among the patterns."""


class PatternIndex:
    """The keys of one table, and the results of earlier lookups."""

    def __init__(self, field: str, patterns: Collection[str], expressions: Expressions) -> None:
        self._field, self._patterns, self._expressions = field, tuple(patterns), expressions
        self._plain = [plain_pattern(pattern) for pattern in self._patterns]
        self._proper: dict[int, str] = {}
        self._orders: dict[PlainPattern, int] = {}
        self._wholes: _Table = {}
        self._ends: _Table = {}
        for order, (pattern, plain) in enumerate(zip(self._patterns, self._plain, strict=True)):
            if plain is None:
                self._proper[order] = ending(pattern)
            else:
                self._orders.setdefault(plain, order)
                table = self._wholes if plain.whole else self._ends
                of_length = table.setdefault(len(plain.text), {})
                of_length.setdefault(plain.dots, {}).setdefault(plain.text, order)
        self._compared = 0
        self._found: dict[str, str | None] = {}

    def first(self, module: str) -> str | None:
        """The key that counts for `module`: the first that matches, as in PEFT.

        Raises:
            TooLarge: keys and modules are more than any adapter has.
        """
        if not self._patterns:
            return None
        if module not in self._found:
            self._found[module] = self._first(module)
        return self._found[module]

    def idle(self, modules: Collection[str]) -> list[str]:
        """The keys that match none of `modules`. Raises as `first` does."""
        if not self._patterns:
            return []
        matched = {order for module in modules for order in self._matching(module)}
        for order, expression in self._proper.items():
            if any(self._expressions.match(expression, module, self._field) for module in modules):
                matched.add(order)
        return [
            pattern
            for order, (pattern, plain) in enumerate(zip(self._patterns, self._plain, strict=True))
            if (order if plain is None else self._orders[plain]) not in matched
        ]

    def _first(self, module: str) -> str | None:
        earliest = min(self._matching(module), default=len(self._patterns))
        for order, expression in self._proper.items():
            if order > earliest:
                break
            if self._expressions.match(expression, module, self._field) is not None:
                return self._patterns[order]
        return self._patterns[earliest] if earliest < len(self._patterns) else None

    def _matching(self, module: str) -> Iterator[int]:
        """The places of the matching plain keys."""
        # `$` also matches before a newline at the end, and a dot does not match a newline.
        path = module.removesuffix("\n")
        if "\n" in path:
            return
        for end in ends(path):
            yield from self._in(self._ends, end)
        yield from self._in(self._wholes, path)

    def _in(self, table: _Table, text: str) -> Iterator[int]:
        for dots, orders in table.get(len(text), {}).items():
            self._compared += len(text) if dots else 0
            if self._compared > MOST_CHARACTERS:
                raise TooLarge(
                    f"`{self._expressions.path}`: matching the {len(self._patterns):,} keys of `{self._field}` with "
                    f"the module names takes more than {MOST_CHARACTERS:,} comparisons",
                    "write one expression for many modules; no adapter needs this many keys",
                )
            order = orders.get(_dotted(text, dots) if dots else text)
            if order is not None:
                yield order


def ending(pattern: str) -> str:
    """The expression that PEFT's `get_pattern_key` uses to match a key against a module's path."""
    return rf"(.*\.)?({pattern})$"


def _dotted(text: str, dots: Iterable[int]) -> str:
    """The text with a dot at each of these positions."""
    characters = list(text)
    for dot in dots:
        characters[dot] = "."
    return "".join(characters)
