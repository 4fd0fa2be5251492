"""Rules: each one way in which an adapter goes wrong, with a stable code and a page.

In: a rule is a function from facts to a sentence (or None where it has nothing to say); its docstring is its page.
Out: the decorated function gives a `Finding` for a station; `diagnose` turns a ledger into `Diagnostic`s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import Any, Literal, ParamSpec, overload

from lora_probe.ledger import Finding, Ledger, Station, Value, clauses

Severity = Literal["error", "warning", "info"]
P = ParamSpec("P")

FAMILIES = ("weights", "shapes", "serving", "loading", "applying", "merging")
"""One file each: LP2xx, LP3xx, LP4xx, LP5xx, LP6xx, LP7xx."""


@dataclass(frozen=True)
class Rule:
    """What is known about a rule without running it."""

    code: str
    name: str
    station: Station | Literal["load", "merge"]
    value: Value
    severity: Severity
    hint: str
    page: str


@dataclass(frozen=True)
class Diagnostic:
    """One finding for a person or a program, over all modules that share it."""

    code: str
    name: str
    severity: Severity
    message: str
    hint: str
    modules: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    path: str | None = None
    line: int | None = None


_registry: dict[str, Rule] = {}


class _Register:
    """The decorator that `rule` makes. A rule that always has something to say always gives a Finding."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    @overload
    def __call__(self, judge: Callable[P, str]) -> Callable[P, Finding]: ...

    @overload
    def __call__(self, judge: Callable[P, str | None]) -> Callable[P, Finding | None]: ...

    def __call__(self, judge: Callable[P, str | None]) -> Callable[P, Finding | None]:
        known = Rule(page=inspect.getdoc(judge) or "", **self.facts)
        if known.code in _registry:
            raise ValueError(f"two rules are called {known.code}")
        _registry[known.code] = known

        @wraps(judge)
        def finding(*args: P.args, **kwargs: P.kwargs) -> Finding | None:
            message = judge(*args, **kwargs)
            return None if message is None else Finding(known.value, known.code, message)

        return finding


def rule(
    code: str,
    name: str,
    station: Station | Literal["load", "merge"],
    value: Value,
    *,
    hint: str,
    severity: Severity = "error",
) -> _Register:
    """Register a function from facts to a sentence as the rule `code`; calling it then gives a Finding."""
    return _Register(code=code, name=name, station=station, value=value, severity=severity, hint=hint)


def all_rules() -> dict[str, Rule]:
    """Every rule by its code, in the order of the codes."""
    for family in FAMILIES:
        import_module(f"lora_probe.rules.{family}")
    return dict(sorted(_registry.items()))


def diagnose(ledger: Ledger) -> list[Diagnostic]:
    """The ledger's losses and errors as diagnostics, one for each rule and station."""
    known = all_rules()
    found = []
    if ledger.refused:
        found.append(_diagnostic(known["LP401"], ledger.message, (), ledger.engine))
    for sentence, finding, rows in clauses(ledger):
        if ledger.refused and not finding.code.startswith(("LP2", "LP3")):
            # What the engine would have done with it nobody knows; what is wrong in the file may be the reason.
            continue
        modules = tuple(row.module for row in rows)
        found.append(_diagnostic(known[finding.code or "LP500"], sentence, modules, ledger.engine))
    return found


def _diagnostic(rule: Rule, message: str, modules: tuple[str, ...], engine: str) -> Diagnostic:
    return Diagnostic(rule.code, rule.name, rule.severity, message, rule.hint, modules, (engine,))


def as_json(diagnostic: Diagnostic) -> dict[str, Any]:
    return {
        "code": diagnostic.code,
        "name": diagnostic.name,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "hint": diagnostic.hint,
        "modules": list(diagnostic.modules),
        "engines": list(diagnostic.engines),
        "path": diagnostic.path,
        "line": diagnostic.line,
    }
