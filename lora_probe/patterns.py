"""Regular expressions from files that nobody vouches for, with an end to their patience.

In: an expression and a name. Out: a match as Python's `re` finds it; an expression that takes forever (`(a+)+$`) is an
error. PEFT matches the same expressions with `re`, and hangs.
"""

from __future__ import annotations

from typing import Protocol

import regex

from lora_probe.errors import UnreadableFile
from lora_probe.files import shown

PATIENCE = 1.0
"""Seconds for one name. Real expressions take microseconds."""


class EndlessPattern(UnreadableFile):
    """An expression that does not come to an end."""


class Match(Protocol):
    """What is used of a match."""

    def __getitem__(self, group: str) -> str: ...


def compiles(pattern: str) -> None:
    """Raises ValueError for an expression that is none."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(str(error)) from error


def match(pattern: str, name: str) -> Match | None:
    """As `re.match`. Raises EndlessPattern."""
    try:
        found: Match | None = regex.match(pattern, name, timeout=PATIENCE)
    except TimeoutError:
        raise _endless(pattern) from None
    return found


def fullmatch(pattern: str, name: str) -> Match | None:
    """As `re.fullmatch`. Raises EndlessPattern."""
    try:
        found: Match | None = regex.fullmatch(pattern, name, timeout=PATIENCE)
    except TimeoutError:
        raise _endless(pattern) from None
    return found


def _endless(pattern: str) -> EndlessPattern:
    return EndlessPattern(
        f"adapter_config.json: the expression `{shown(pattern)}` does not come to an end on a module's name",
        "write it without nested repetition; PEFT would hang on it",
    )
