"""Extension points: what other distributions add to lora-probe, by entry points.

In: the name of a group. Out: its entry points, and the objects that they load. An entry point that cannot be loaded is
one error with its name and its distribution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_probe.errors import ProbeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENGINES = "lora_probe.engines"
"""Engines that run an adapter and record it. The name is what `--engine` accepts."""
PREDICTORS = "lora_probe.predictors"
"""Predictors of an engine's ledger for `check`, under the engine's name. The engine need not be installed."""
RULES = "lora_probe.rules"
"""Modules that register rules when they are imported."""
FORMATS = "lora_probe.formats"
"""Output formats; `render/formats.py` documents them."""

_FIRST = ("peft", "vllm")


@cache
def points(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group by their names: lora-probe's own first, then the others in alphabetical order.

    Raises:
        ProbeError: two distributions have an entry point with the same name.
    """
    from importlib.metadata import entry_points

    by_name: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if (other := by_name.setdefault(point.name, point)) != point:
            raise ProbeError(f"{described(point)} clashes with {described(other)}", "uninstall one of the two")
    return {name: by_name[name] for name in in_order(by_name)}


def in_order(names: Iterable[str]) -> list[str]:
    """Names of engines: `peft`, `vllm`, then the others in alphabetical order."""
    return sorted(set(names), key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))


def engine_names() -> tuple[str, ...]:
    """The engines whose ledgers `check` predicts. Wherever lora-probe handles every engine, it is these.

    Raises:
        ProbeError: none is registered, not even those of lora-probe itself.
    """
    names = tuple(points(PREDICTORS))
    if not names:
        raise ProbeError(
            f"no entry points in the group `{PREDICTORS}`: lora-probe is not installed, or an older version is",
            "install it again with pip",
        )
    return names


def load(point: EntryPoint) -> Any:
    """The object that an entry point refers to.

    Raises:
        ProbeError: importing it failed, for whatever reason.
    """
    try:
        return point.load()
    # This runs code of other distributions, which may raise anything: report it in one line, with its origin.
    except Exception as error:
        raise broken(point, f"{type(error).__name__}: {error}") from error


def broken(point: EntryPoint, why: str, use: str = "load") -> ProbeError:
    """The error for an entry point that cannot be used."""
    hint = f"fix or uninstall `{point.dist.name}`" if point.dist is not None else ""
    return ProbeError(f"cannot {use} {described(point)}: {why}", hint)


def described(point: EntryPoint) -> str:
    """An entry point as it is declared, with its distribution."""
    owner = f" of the distribution `{point.dist.name}`" if point.dist is not None else ""
    return f"the entry point `{point.name} = {point.value}` ({point.group}){owner}"
