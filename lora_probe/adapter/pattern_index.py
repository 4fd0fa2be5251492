"""Names and patterns of a config, looked up rather than tried one after the other.

In: the keys of `rank_pattern` or `alpha_pattern`, in their order. Out: a `PatternIndex` with the key that PEFT's
`get_pattern_key` takes for a module, and the keys that match none. A config may hold a hundred thousand names, and
most are plain: no operator but a dot, which stands for any character, and `^` at the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lora_probe.errors import TooLarge
from lora_probe.files.regexes import Expressions

MOST_CHARACTERS = 200_000_000
"""Characters that are compared to find plain patterns with dots; a table with a path for each of 140,000 experts takes
a fifth of it."""

_ORDINARY = r"[^\\^$*+?{}\[\]|()\n]"
_ESCAPED = r"\\[!-/:-@\[-`{-~]"
_PLAIN = re.compile(rf"(\^?)({_ORDINARY}*(?:{_ESCAPED}{_ORDINARY}*)*)")
_PIECE = re.compile(r"\\?(.)")
_WORD = re.compile(r"[^\\^$*+?{}\[\]|()\n.]*")


@dataclass(frozen=True, slots=True)
class PlainPattern:
    """A pattern without operators. `dots` are the places in `text` at which any character may stand; with `whole` it
    matches a whole path, else an end of it as well."""

    text: str
    dots: tuple[int, ...]
    whole: bool


def plain_pattern(pattern: str) -> PlainPattern | None:
    """The pattern as a plain one; None for an expression."""
    found = _PLAIN.fullmatch(pattern)
    if found is None:
        return None
    text = found[2]
    pieces: Sequence[str] = [piece[0] for piece in _PIECE.finditer(text)] if "\\" in text else text
    dots = tuple(place for place, piece in enumerate(pieces) if piece == ".")
    return PlainPattern("".join(piece[-1] for piece in pieces), dots, bool(found[1]))


def is_word(pattern: str) -> bool:
    """Whether an expression is a name that can be one part of a path, without operators and dots."""
    return _WORD.fullmatch(pattern) is not None


def ends(path: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    yield path
    begin = path.find(".") + 1
    while begin:
        yield path[begin:]
        begin = path.find(".", begin) + 1


def beginnings(path: str) -> Iterator[str]:
    """What stands before each dot: `a.b`, `a` of `a.b.c`."""
    end = path.rfind(".")
    while end >= 0:
        yield path[:end]
        end = path.rfind(".", 0, end)


def parts(path: str) -> list[str]:
    """The parts of a path that `(^|.*\\.)part($|\\..*)` matches: a dot of an expression stands for no newline, so that
    nothing behind one is a part, and what stands before one only where the path ends with it."""
    head, newline, rest = path.partition("\n")
    found = head.split(".")
    return found[:-1] if newline and rest else found


_Table = dict[int, dict[tuple[int, ...], dict[str, int]]]
"""Length of a plain pattern, places of its dots, its text -> its place among the patterns."""


class PatternIndex:
    """The keys of one table, and the modules that were looked up in it."""

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
        """The places of the plain keys that match."""
        # `$` matches before a newline at the end as well, and a dot matches none.
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
                    f"`{self._expressions.path}`: the {len(self._patterns):,} keys of `{self._field}` and the names of "
                    f"the modules take more than {MOST_CHARACTERS:,} comparisons of characters",
                    "no adapter needs as many keys: write one expression for many modules",
                )
            order = orders.get(_dotted(text, dots) if dots else text)
            if order is not None:
                yield order


def ending(pattern: str) -> str:
    """The expression with which PEFT's `get_pattern_key` looks for a key in a module's path."""
    return rf"(.*\.)?({pattern})$"


def _dotted(text: str, dots: Iterable[int]) -> str:
    """The text with a dot at each of these places."""
    characters = list(text)
    for dot in dots:
        characters[dot] = "."
    return "".join(characters)
