"""What is known about one engine without running it: `Predictor`, and the predictors that are installed.

In: the entry points of the group `lora_probe.predictors`, each a `Predictor` under the name of its engine. Out: the
predictors by name. An engine is predicted whether it is installed or not; one without a predictor is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from lora_probe.adapter import Adapter, TrainedAs
from lora_probe.base import Base, EngineView
from lora_probe.base.engine_view import of_headers
from lora_probe.files.extensions import PREDICTORS, broken, engine_names, load, points
from lora_probe.ledger import Finding
from lora_probe.names import Key
from lora_probe.prediction.places import resolve
from lora_probe.rules.lp3_names import no_such_module, other_class, renamed_part
from lora_probe.rules.paths import changed_words
from lora_probe.rules.stored import Expected
from lora_probe.rules.subject import Place, Serving, Subject

VIEW_UNKNOWN = Finding("unknown", message="the engine's modules for this base model are unknown")

Refusal = tuple[str, str]
"""The code of the rule that a refusal falls under, and the engine's message."""


def _always(trained: TrainedAs, views: Mapping[str, EngineView]) -> str:
    return ""


def _never(subject: Subject, row: Expected, place: Place | None) -> Refusal | None:
    return None


@dataclass(frozen=True)
class Predictor:
    """How one engine decides what becomes of an adapter.

    `name` is what `--engine` accepts, `title` what messages call the engine. It cannot run without the modules in
    `needs`, and `install` is the command that installs it. `has_flags`: it accepts flags of its own, after `--`.

    `judge` returns `read` and `placed` of a row that has a pair in the file. The place is None if the engine's modules
    for the base model are unknown. `refuse` returns why the engine refuses the whole adapter for the shapes of a row.
    `not_served` returns why the engine does not serve the model that the adapter was trained on, empty if it may; its
    views are empty if the base model is unknown. `resolve` returns where each pair leads. `view_of_headers` replaces
    the engine's own answer if it cannot be asked. `ignored_fields` are keys of adapter_config.json that the engine
    never reads.
    """

    name: str
    title: str
    judge: Callable[[Subject, Expected, Place | None], tuple[Finding, Finding]]
    refuse: Callable[[Subject, Expected, Place | None], Refusal | None] = _never
    not_served: Callable[[TrainedAs, Mapping[str, EngineView]], str] = _always
    resolve: Callable[[EngineView, Adapter, Serving], Mapping[Key, Place]] = resolve
    view_of_headers: Callable[[Base, str, str], EngineView | None] = of_headers
    needs: tuple[str, ...] = ()
    install: str = ""
    has_flags: bool = True
    ignored_fields: frozenset[str] = frozenset()


@cache
def predictors() -> Mapping[str, Predictor]:
    """The predictors by the names of their engines: PEFT, vLLM, then the others in alphabetical order.

    Raises:
        ProbeError: an entry point cannot be loaded, or is not that of a predictor.
    """
    loaded = {}
    for name in engine_names():
        point = points(PREDICTORS)[name]
        predictor = load(point)
        if not isinstance(predictor, Predictor):
            raise broken(point, f"expected a `Predictor`, got `{type(predictor).__name__}`")
        if predictor.name != name:
            raise broken(point, f"it is the predictor of `{predictor.name}`: both names must be the same")
        loaded[name] = predictor
    return loaded


def title_of(engine: str) -> str:
    """What messages call an engine: its name if it has no predictor."""
    known = predictors()
    return known[engine].title if engine in known else engine


def not_known(subject: Subject) -> Finding:
    """The finding for a row if the engine's modules for the base model are unknown."""
    return Finding("unknown", message=subject.origin.why_not) if subject.base is None else VIEW_UNKNOWN


def no_module(row: Expected, view: EngineView) -> Finding:
    """The finding for a pair whose name leads to no module of the engine."""
    assert row.entry is not None
    if row.homeless and row.module != row.entry.module:
        stored_as, meant = row.entry.stored_as, row.module
        return (renamed_part if changed_words(stored_as, meant) else other_class)(stored_as, meant)
    return no_such_module(view.model)


def expected_shape(place: Place, embedding: bool) -> tuple[int, int] | None:
    """The rows of B and the columns of A that fit a layer, (tall, wide); None if its shape is unknown or it is
    not a LoRA layer. An embedding's shape is transposed."""
    if place.module is None or place.module.why_not or place.module.shape is None:
        return None
    out, into = place.module.shape
    return (into, out) if embedding else (out, into)
