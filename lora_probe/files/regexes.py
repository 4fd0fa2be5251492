"""Regular expressions from untrusted files, with time limits.

In: an expression and a name. Out: the match that Python's `re` finds, because PEFT matches the same expressions with
`re`. An expression that takes forever (`(a+)+$`) is an error; PEFT would hang on it.
"""

from __future__ import annotations

import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

from lora_probe.errors import ProbeError, TooLarge, UnreadableFile
from lora_probe.files.untrusted import shown

PATIENCE = 1.0
"""Seconds for one name. Real expressions take microseconds."""
PATIENCE_FOR_ONE = 5.0
"""Seconds for one expression over all names."""
PATIENCE_FOR_ALL = 30.0
"""Seconds for all expressions of one config together."""

_CLASS = r"\[\^?(?:[A-Za-z0-9](?:-[A-Za-z0-9])?|[_. /]|\\[dwsDWS.-])+-?\]"
_ALIKE = re.compile(
    # One character, or an anchor, or an alternative.
    r"[A-Za-z0-9_./ ^$|-]|\\[dwsbDWSB]|\\[-./_^$*+?()\[\]{}|\\]"
    rf"|{_CLASS}"
    # A group. Repeated groups are excluded: the two differ in how often they try an empty one.
    r"|\((?:\?:|\?P<[A-Za-z_][A-Za-z0-9_]*>)?(?!\?)|\)"
    # A repetition, greedy or lazy, but not possessive.
    r"|(?:\?|(?<!\))(?:[*+]|\{(?:[0-9]{1,3}(?:,[0-9]{0,3})?|,[0-9]{1,3})\}))\??(?![*+?{])"
)
"""The syntax that `regex` reads as `re` does. Expressions with any other syntax are left to `re`: `(?:zz){e}` and
`[[:alpha:]]` mean something else to `regex`."""
LONGEST_ALIKE = 1_000
"""Longest expression, in characters, that `regex` compiles: it needs more time and memory than `re`."""


class EndlessPattern(UnreadableFile):
    """An expression that takes too long on one name. `key` and `line` are those of the field that holds it."""


class Match(Protocol):
    """The part of a match object that is used."""

    def __getitem__(self, group: str) -> str: ...


class _Expression:
    """One expression, and the seconds that it has taken so far."""

    def __init__(self, pattern: str) -> None:
        self.taken = 0.0
        self.exact = compiled(pattern)
        self.timed = _timed(pattern)

    def match(self, name: str, whole: bool, seconds: float) -> Match | None:
        """Raises TimeoutError after `seconds`."""
        if self.timed is not None and name and name.isascii() and name.isprintable():
            timed = self.timed.fullmatch if whole else self.timed.match
            # What takes too long in `regex` may be easy for `re`.
            with suppress(TimeoutError):
                match: Match | None = timed(name, timeout=seconds)
                return match
        exact = self.exact.fullmatch if whole else self.exact.match
        return _interrupted(lambda: exact(name), seconds)


class Expressions:
    """The expressions of one config, each compiled once, and the time that they have taken in total. `lines` maps the
    config's keys to their lines."""

    def __init__(self, path: Path, lines: Mapping[str, int] | None = None) -> None:
        self.path = path
        self._lines = lines or {}
        self._expressions: dict[str, _Expression] = {}
        self._taken = 0.0

    def match(self, pattern: str, name: str, key: str = "") -> Match | None:
        """As `re.match`. `key` is the field of the config that holds the expression.

        Raises:
            EndlessPattern: it takes longer than PATIENCE for this name.
            TooLarge: it has taken too long for all names, or all expressions have.
            ProbeError: it needs a time limit, which is only possible in the main thread.
        """
        return self._ask(pattern, name, key, whole=False)

    def fullmatch(self, pattern: str, name: str, key: str = "") -> Match | None:
        """As `re.fullmatch`. Raises as `match` does."""
        return self._ask(pattern, name, key, whole=True)

    def _ask(self, pattern: str, name: str, key: str, whole: bool) -> Match | None:
        if pattern not in self._expressions:
            self._expressions[pattern] = _Expression(pattern)
        expression = self._expressions[pattern]
        left = min(PATIENCE, PATIENCE_FOR_ONE - expression.taken, PATIENCE_FOR_ALL - self._taken)
        begin = time.perf_counter()
        try:
            if left <= 0:
                raise TimeoutError
            return expression.match(name, whole, left)
        except TimeoutError:
            raise self._endless(pattern, key, left) from None
        except _NotInterrupted:
            raise ProbeError(
                f"`{self.path}`: the expression `{shown(pattern)}` cannot be matched outside of the main thread",
                "call lora-probe from the main thread, the only one in which Python can interrupt an endless match",
            ) from None
        finally:
            seconds = time.perf_counter() - begin
            expression.taken += seconds
            self._taken += seconds

    def _endless(self, pattern: str, key: str, left: float) -> ProbeError:
        where = f"`{self.path}`: the expression `{shown(pattern)}`"
        if left == PATIENCE:
            return EndlessPattern(
                f"{where} takes more than {PATIENCE:.0f} s on one module name",
                "write it without nested repetition; PEFT would hang on it",
                line=self._lines.get(key),
                key=key or None,
            )
        if PATIENCE_FOR_ALL - self._taken <= left:
            return TooLarge(
                f"`{self.path}`: its {len(self._expressions):,} expressions take more than {PATIENCE_FOR_ALL:.0f} s "
                "on the module names",
                "write fewer expressions, or names instead",
            )
        return TooLarge(
            f"{where} takes more than {PATIENCE_FOR_ONE:.0f} s on the module names",
            "write it without nested repetition",
        )


def compiled(pattern: str) -> re.Pattern[str]:
    """The expression compiled by `re`. Raises as `re.compile` does."""
    with warnings.catch_warnings():
        # Python warns that `[[:alpha:]]` may change its meaning.
        warnings.simplefilter("ignore")
        return re.compile(pattern)


def is_alike(pattern: str) -> bool:
    """Whether `regex` certainly finds the same in printable ASCII as `re` does."""
    return len(pattern) <= LONGEST_ALIKE and not _ALIKE.sub("", pattern)


def _timed(pattern: str) -> Any:
    # It takes longer to import than a header to read, and few configs have an expression.
    import regex

    try:
        return regex.compile(pattern) if is_alike(pattern) else None
    except (regex.error, RecursionError):
        return None


class _NotInterrupted(Exception):
    pass


def _interrupted(judge: Callable[[], Match | None], seconds: float) -> Match | None:
    """The result of `judge`, which uses `re`: it checks for signals while it matches.

    Raises:
        TimeoutError: after `seconds`.
        _NotInterrupted: this thread receives no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise _NotInterrupted

    def interrupt(*_: object) -> NoReturn:
        raise TimeoutError

    handler = signal.signal(signal.SIGVTALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        try:
            return judge()
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        # None is a handler that Python did not set and cannot restore.
        signal.signal(signal.SIGVTALRM, handler or signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
