"""Rules: each one way in which an adapter goes wrong, with a stable code and a page.

In: a rule is a function, and its docstring is its page; `{vllm}` in it stands for the supported versions of vLLM. Most
go from facts about one module to a sentence, or None where they have nothing to say, and become a `Finding` at a
station. Others look at a whole adapter and give `Found`s.
Out: `diagnose` turns a ledger into `Diagnostic`s, `diagnostic` a `Found` into one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, overload

from lora_probe.ledger import Finding, Station, Value
from lora_probe.names import Key
from lora_probe.rules.vllm_versions import SUPPORTED

if TYPE_CHECKING:
    from lora_probe.rules.subject import Case

Severity = Literal["error", "warning", "info"]
Needs = Literal["files", "base", "weights of the base", "vllm"]
P = ParamSpec("P")

ENGINES = ("peft", "vllm")
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


@dataclass(frozen=True)
class Rule:
    """What is known about a rule without running it."""

    code: str
    name: str
    station: Station | Literal["adapter", "load", "merge"]
    value: Value
    severity: Severity
    hint: str
    page: str
    engines: tuple[str, ...] = ENGINES
    needs: Needs = "files"


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
        known = Rule(page=_page(judge), **self.facts)
        if known.code in _registry:
            raise ValueError(f"two rules are called {known.code}")
        _registry[known.code] = known

        @wraps(judge)
        def finding(*args: P.args, **kwargs: P.kwargs) -> Finding | None:
            message = judge(*args, **kwargs)
            return None if message is None else Finding(known.value, known.code, message)

        return finding


def _page(judge: Callable[..., Any]) -> str:
    """The docstring of a rule, with the versions of vLLM that are known in place of `{vllm}`."""
    return (inspect.getdoc(judge) or "").replace("{vllm}", SUPPORTED)


def rule(
    code: str,
    name: str,
    station: Station | Literal["adapter", "load", "merge"],
    value: Value,
    *,
    hint: str,
    severity: Severity = "error",
    engines: tuple[str, ...] = ENGINES,
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
    engines: tuple[str, ...] = ENGINES,
    needs: Needs = "files",
) -> Callable[[Callable[[Case], Iterable[Found]]], Callable[[Case], Iterable[Found]]]:
    """Register a function from a case (an adapter, and what is known of its base and of the engines) to what it finds
    as the rule `code`. It is asked only where what it `needs` is there."""

    def register(judge: Callable[[Case], Iterable[Found]]) -> Callable[[Case], Iterable[Found]]:
        if code in _registry:
            raise ValueError(f"two rules are called {code}")
        _registry[code] = Rule(code, name, "adapter", "wrong", severity, hint, _page(judge), engines, needs)
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
    return dict(sorted(_registry.items()))
