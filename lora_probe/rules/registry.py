"""Rules: each one way in which an adapter goes wrong, with a stable code and a page.

In: a rule is a function, and its docstring is its page. Most go from facts about one module to a sentence, or None
where they have nothing to say, and become a `Finding` at a station. Others look at a whole adapter and give `Found`s.
Out: `diagnose` turns a ledger into `Diagnostic`s, `diagnostic` a `Found` into one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, overload

from lora_probe.errors import ProbeError
from lora_probe.extensions import RULES, broken, engine_names, load, points
from lora_probe.ledger import Finding, Station, Value
from lora_probe.names import Key

if TYPE_CHECKING:
    from lora_probe.rules.subject import Case

Severity = Literal["error", "warning", "info"]
Needs = str
"""`files`, `base`, `weights of the base`, or an engine: what it has for the base."""
P = ParamSpec("P")

FAMILIES = {
    "lp1_config": "LP1xx: adapter_config.json",
    "lp2_files": "LP2xx: the weights file",
    "lp2_variants": "LP2xx: the weights file",
    "lp2_weights": "LP2xx: the weights file",
    "lp2_names": "LP2xx and LP3xx: names",
    "lp3_shapes": "LP3xx: the base",
    "lp3_base": "LP3xx: the base",
    "lp3_origin": "LP3xx: the base",
    "lp4_serving": "LP4xx: serving",
    "lp5_loading": "LP5xx: loading, in a running engine",
    "lp6_applying": "LP6xx: applying, in a running engine",
    "lp7_merging": "LP7xx: merging",
}
"""The files that hold the rules, and what their codes begin with."""
OTHERS_CODE = re.compile(r"(?!LP)[A-Z]{2,8}[0-9]{3}")
"""Codes of rules that other distributions add: a prefix of their own, then three digits."""


@dataclass(frozen=True)
class Rule:
    """What is known about a rule without running it. `engines` is empty for a rule about every engine."""

    code: str
    name: str
    station: Station | Literal["adapter", "load", "merge"]
    value: Value
    severity: Severity
    hint: str
    page: str
    engines: tuple[str, ...] = ()
    needs: Needs = "files"

    @property
    def in_engines(self) -> tuple[str, ...]:
        """The names of the engines that it is about."""
        return self.engines or engine_names()


@dataclass(frozen=True)
class Found:
    """What a rule on a whole adapter has to say.

    With `refuses` the engines do not load the adapter, and `message` is why. With `value` and `keys` the modules get
    that finding at `station` in the ledgers of the engines. `field` is the key of adapter_config.json that is to
    blame, `path` another file. `engines` are those of the rule unless given.
    """

    message: str
    keys: tuple[Key, ...] = ()
    station: Station = "placed"
    value: Value = "ok"
    engines: tuple[str, ...] = ()
    refuses: bool = False
    field: str | None = None
    path: Path | None = None


_registry: dict[str, Rule] = {}
_surveys: dict[str, Callable[[Case], Iterable[Found]]] = {}


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
    station: Station | Literal["adapter", "load", "merge"],
    value: Value,
    *,
    hint: str,
    severity: Severity = "error",
    engines: tuple[str, ...] = (),
    needs: Needs = "files",
) -> _Register:
    """Register a function from facts to a sentence as the rule `code`; calling it then gives a Finding."""
    return _Register(
        code=code, name=name, station=station, value=value, severity=severity, hint=hint, engines=engines, needs=needs
    )


def survey(
    code: str,
    name: str,
    *,
    hint: str,
    severity: Severity = "error",
    engines: tuple[str, ...] = (),
    needs: Needs = "files",
) -> Callable[[Callable[[Case], Iterable[Found]]], Callable[[Case], Iterable[Found]]]:
    """Register a function from a case (an adapter, and what is known of its base and of the engines) to what it finds
    as the rule `code`. It is asked only where what it `needs` is there."""

    def register(judge: Callable[[Case], Iterable[Found]]) -> Callable[[Case], Iterable[Found]]:
        if code in _registry:
            raise ValueError(f"two rules are called {code}")
        page = inspect.getdoc(judge) or ""
        _registry[code] = Rule(code, name, "adapter", "wrong", severity, hint, page, engines, needs)
        _surveys[code] = judge
        return judge

    return register


def surveys() -> Iterator[tuple[Rule, Callable[[Case], Iterable[Found]]]]:
    """The rules on whole adapters, in the order of their codes."""
    for code, known in all_rules().items():
        if code in _surveys:
            yield known, _surveys[code]


def all_rules() -> dict[str, Rule]:
    """Every rule by its code, in the order of the codes."""
    for family in FAMILIES:
        import_module(f"lora_probe.rules.{family}")
    for point in points(RULES).values():
        _register_others(point)
    return dict(sorted(_registry.items()))


def _register_others(point: EntryPoint) -> None:
    """Import a module of rules of another distribution.

    Raises:
        ProbeError: it cannot be imported, or one of its codes is not one that others may use. Its rules are left out.
    """
    before = set(_registry)
    try:
        load(point)
        for code in _registry.keys() - before:
            if not OTHERS_CODE.fullmatch(code):
                raise broken(point, f"`{code}` is not a code for its rules: use a prefix of your own (`XY101`)")
    except ProbeError:
        for code in _registry.keys() - before:
            del _registry[code]
            _surveys.pop(code, None)
        raise
