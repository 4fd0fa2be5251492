"""The registry of rules: each is one way in which an adapter fails, with a stable code and a page.

In: functions under `@rule` or `@survey`, which hold every fact about a rule; the docstring is its page, and `{vllm}` in
it stands for the supported versions of vLLM. Most rules return a sentence about one module, or None if nothing is
wrong; it becomes a `Finding` at a station. Others check a whole adapter and yield `AdapterFinding`s. Out: `all_rules`,
`surveys` and `families`.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypedDict, Unpack, overload

from lora_probe.errors import ProbeError
from lora_probe.files.extensions import RULES, broken, engine_names, load, points
from lora_probe.ledger import Finding, Station, Value
from lora_probe.names import Key
from lora_probe.rules.vllm_versions import SUPPORTED

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from lora_probe.rules.subject import Subject

Severity = Literal["error", "warning", "info"]
Needs = str
"""`files`, `base`, `weights of the base`, or the name of an engine: its modules for the base."""
P = ParamSpec("P")
Survey = Callable[["Subject"], Iterable["AdapterFinding"]]

OTHERS_CODE = re.compile(r"(?!LP)[A-Z]{2,8}[0-9]{3}")
"""Codes of rules that other distributions add: their own prefix, then three digits."""
_CODE = re.compile(r"([A-Z]+)([0-9]?)")
_FAMILY_MODULE = re.compile(r"lp\d_\w+")


@dataclass(frozen=True)
class Family:
    """Rules whose codes begin alike: those of the modules `lp4_*` begin with `LP4`.

    One of these modules holds the constant `FAMILY`. `commands` names the commands that report its rules.
    `loading_step` is the order in which an engine runs these checks while loading: of several refusals it reports the
    one of the lowest step. `in_check`: `check` runs them; the others are about running engines and merges.
    """

    prefix: str
    title: str
    commands: str = ""
    loading_step: int = 9
    in_check: bool = True

    @property
    def heading(self) -> str:
        return f"{self.prefix}xx: {self.title}" if self.title else f"{self.prefix}xx"


@dataclass(frozen=True)
class Rule:
    """What is known about a rule without running it.

    `engines` is empty for a rule about every engine. `field` is the key of adapter_config.json that a finding points at
    unless it has its own. `fixable`: `check --fix` repairs it. `short` fits into a cell of a table. `consequence`: it
    usually follows from another finding, and is reported after it. `explains`: codes of rules whose findings about the
    same modules or the same field follow from this one and are left out. `predicate`: the sentence continues one that
    begins with the modules' names (`layer 5 q_proj` is `not in the file`). `per_message`: different messages are
    different diagnostics; for other rules all findings are one diagnostic with the first message. `follows`: the rules
    on whole adapters that explain its findings; if one of them has a finding, those of this rule are not reported.
    `module` is the Python module that registered the rule.
    """

    code: str
    name: str
    station: Station | Literal["adapter", "load", "merge"]
    value: Value
    hint: str
    page: str
    severity: Severity = "error"
    engines: tuple[str, ...] = ()
    needs: Needs = "files"
    field: str | None = None
    fixable: bool = False
    short: str = ""
    consequence: bool = False
    explains: tuple[str, ...] = ()
    predicate: bool = False
    per_message: bool = False
    follows: tuple[str, ...] = ()
    module: str = ""

    @property
    def in_engines(self) -> tuple[str, ...]:
        """The names of the engines that it is about."""
        return self.engines or engine_names()

    @property
    def measured(self) -> bool:
        """Whether only a run or a merge shows it."""
        return self.station in ("applied", "agrees", "merge")

    def finding(self, value: Value, message: str, field: str | None = None, hint: str = "") -> Finding:
        """A finding under this rule; it points at the rule's field unless another is passed."""
        return Finding(value, self.code, message, field or self.field, self.predicate, hint)


@dataclass(frozen=True)
class Sentence:
    """What a rule function returns instead of a string if the cause is `field` and not the rule's field. `hint`: what
    to do about it, if that is not the rule's hint."""

    message: str
    field: str | None
    hint: str = ""


@dataclass(frozen=True)
class AdapterFinding:
    """What a rule on a whole adapter found.

    With `refuses` the engines do not load the adapter, and `message` is the reason; with `refused_by` only some of them
    do not. With `value` and `keys` the modules get that finding at `station` in the ledgers of the engines. `field` is
    the key of adapter_config.json that caused it, `path` another file. `engines` and `hint` are those of the rule
    unless set.
    """

    message: str
    keys: tuple[Key, ...] = ()
    station: Station = "placed"
    value: Value = "ok"
    engines: tuple[str, ...] = ()
    refuses: bool = False
    field: str | None = None
    path: Path | None = None
    hint: str = ""
    refused_by: tuple[str, ...] = ()


class _Facts(TypedDict, total=False):
    """The arguments of `rule` and `survey` that `Rule` has defaults for."""

    severity: Severity
    engines: tuple[str, ...]
    needs: Needs
    field: str | None
    fixable: bool
    short: str
    consequence: bool
    explains: tuple[str, ...]
    predicate: bool
    per_message: bool
    follows: tuple[str, ...]


_registry: dict[str, Rule] = {}
_surveys: dict[str, Survey] = {}


def _register(new: Rule) -> Rule:
    for other in _registry.values():
        for what in ("code", "name"):
            if getattr(new, what) == getattr(other, what):
                raise ValueError(f"two rules have the same {what}: {_described(other)} and {_described(new)}")
    _registry[new.code] = new
    return new


def _described(rule: Rule) -> str:
    return f"{rule.code} {rule.name} ({rule.module})"


class _Register:
    """The decorator that `rule` makes. A rule that always returns a sentence always returns a Finding."""

    def __init__(self, **facts: Any) -> None:
        self.facts = facts

    @overload
    def __call__(self, judge: Callable[P, str | Sentence]) -> Callable[P, Finding]: ...

    @overload
    def __call__(self, judge: Callable[P, str | Sentence | None]) -> Callable[P, Finding | None]: ...

    def __call__(self, judge: Callable[P, str | Sentence | None]) -> Callable[P, Finding | None]:
        registered = _register(Rule(page=_page(judge), module=judge.__module__, **self.facts))

        @wraps(judge)
        def finding(*args: P.args, **kwargs: P.kwargs) -> Finding | None:
            sentence = judge(*args, **kwargs)
            if isinstance(sentence, Sentence):
                return registered.finding(registered.value, sentence.message, sentence.field, sentence.hint)
            return None if sentence is None else registered.finding(registered.value, sentence)

        return finding


def _page(judge: Callable[..., Any]) -> str:
    """The docstring of a rule, with the supported versions of vLLM in place of `{vllm}`."""
    return (inspect.getdoc(judge) or "").replace("{vllm}", SUPPORTED)


def rule(
    code: str,
    name: str,
    station: Station | Literal["adapter", "load", "merge"],
    value: Value,
    *,
    hint: str,
    **facts: Unpack[_Facts],
) -> _Register:
    """Register a function that returns a sentence as the rule `code`; calling it then returns a Finding. `Rule`
    documents the arguments and has their defaults.

    Raises:
        ValueError: another rule has the code or the name.
    """
    return _Register(code=code, name=name, station=station, value=value, hint=hint, **facts)


def survey(code: str, name: str, *, hint: str, **facts: Unpack[_Facts]) -> Callable[[Survey], Survey]:
    """Register a function that checks a whole subject (an adapter, and what is known about its base and the engines) as
    the rule `code`. It is called only if what it `needs` is available. Findings without a field or a file of their own
    point at `field`.

    Raises:
        ValueError: another rule has the code or the name.
    """

    def register(judge: Survey) -> Survey:
        of_adapter = Rule(code, name, "adapter", "wrong", hint, _page(judge), module=judge.__module__, **facts)
        _register(of_adapter)
        return _add_survey(of_adapter, judge)

    return register


def whole(code: str) -> Callable[[Survey], Survey]:
    """Register a function that checks a whole subject for a rule on modules, `code`, which needs to be registered.

    Its findings are reported instead of the rule's findings on single modules.
    """
    return lambda judge: _add_survey(_registry[code], judge)


def _add_survey(of_adapter: Rule, judge: Survey) -> Survey:
    @wraps(judge)
    def findings(subject: Subject) -> Iterator[AdapterFinding]:
        for finding in judge(subject):
            placed = finding.field is not None or finding.path is not None
            yield finding if placed else replace(finding, field=of_adapter.field)

    _surveys[of_adapter.code] = findings
    return findings


def surveys() -> Iterator[tuple[Rule, Survey]]:
    """The rules on whole adapters, in the order of their codes."""
    for code, registered in all_rules().items():
        if code in _surveys:
            yield registered, _surveys[code]


def all_rules() -> dict[str, Rule]:
    """Every rule by its code, in the order of the codes."""
    _family_modules()
    for point in points(RULES).values():
        _register_others(point)
    return dict(sorted(_registry.items()))


def _register_others(point: EntryPoint) -> None:
    """Import a module of rules of another distribution.

    Raises:
        ProbeError: it cannot be imported, or one of its codes is reserved. Its rules are left out.
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


@cache
def families() -> dict[str, Family]:
    """Every family by the prefix of its codes, in that order."""
    every = [module.FAMILY for module in _family_modules() if hasattr(module, "FAMILY")]
    return {family.prefix: family for family in every}


def family_of(code: str) -> Family:
    """The family of a rule; a family without a title if the code does not belong to one."""
    match = _CODE.match(code)
    prefix = match[0] if match else code
    return families().get(prefix) or Family(prefix, "")


@cache
def _family_modules() -> tuple[ModuleType, ...]:
    """The modules of this package that hold rules: their names begin like their codes."""
    package = import_module(__name__.rpartition(".")[0])
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(import_module(f"{package.__name__}.{name}") for name in names if _FAMILY_MODULE.fullmatch(name))
