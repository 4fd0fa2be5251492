"""Codes of rules: `LP201` is ours, `XY101` is another distribution's. Each has a prefix of its own.

In: a code, or what a user writes for some of them (`LP201`, `LP2`, `LP2xx`, `XY`, a rule's name). Out: the codes
that are meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from operator import eq

from lora_probe.names import ranges
from lora_probe.rules.registry import Rule

_PARTS = re.compile(r"([A-Z]+)([0-9]*)")
_WORD = re.compile(r"([A-Z]+?)([0-9]*)X*")


def meant(word: str, rules: Mapping[str, Rule]) -> list[str]:
    """The codes that a code, a prefix or a rule's name stands for; empty if there are none."""
    codes = [code for code in rules if _covers(word.upper(), code)]
    return codes or [code for code, rule in rules.items() if rule.name == word.lower()]


def _covers(word: str, code: str) -> bool:
    """Whether `LP2`, `LP2XX` or `XY` means a code. Our own prefix alone means nothing: it would be every rule."""
    parts, wanted = _PARTS.fullmatch(code), _WORD.fullmatch(word)
    if parts is None or wanted is None:
        return word == code
    if wanted[2]:
        return parts[1] == wanted[1] and parts[2].startswith(wanted[2])
    return parts[1] == word and parts[1] != "LP"


def suggestion(word: str, rules: Mapping[str, Rule]) -> str:
    """The end of an error about an unknown rule: the nearest codes and names, if there are any."""
    # Codes are compared letter by letter: those of one family have neighbours that mean something similar.
    alike = {code: sum(map(eq, word.upper(), code)) for code in rules}
    near = [code for code in sorted(alike, key=lambda code: -alike[code]) if alike[code] > len(code) - 2][:3]
    near = near or get_close_matches(word, [*(rule.name for rule in rules.values())], 3, 0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def numbers_of(codes: Iterable[str]) -> str:
    """Codes by their prefixes: `101-112, 201 after LP, 101 after XY`."""
    return ", ".join(f"{ranges(numbers)} after {prefix}" for prefix, numbers in _by_prefix(codes).items())


def in_ranges(codes: Iterable[str]) -> str:
    """Codes in few words: `LP101-112, 201, XY101`."""
    return ", ".join(f"{prefix}{ranges(numbers)}" for prefix, numbers in _by_prefix(codes).items())


def _by_prefix(codes: Iterable[str]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for code in codes:
        if match := _PARTS.fullmatch(code):
            numbers.setdefault(match[1], []).append(int(match[2]))
    return numbers
