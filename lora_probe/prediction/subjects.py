"""A `Subject` for the rules: an adapter, and where each of its pairs leads in every engine.

In: an adapter, the base and the engines' views of it where they are known, and how it will be served. Out: a `Subject`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_probe.adapter import Adapter
from lora_probe.base import Base, EngineView
from lora_probe.prediction.peft import shapes_in, with_default_targets
from lora_probe.prediction.predictor import predictors
from lora_probe.rules.labels import labels_of, with_labels
from lora_probe.rules.subject import Origin, Serving, Subject


def subject_of(
    adapter: Adapter,
    serving: Serving,
    base: Base | None = None,
    views: Mapping[str, EngineView] | None = None,
    unasked: Mapping[str, str] | None = None,
    origin: Origin | None = None,
    engines: Sequence[str] | None = None,
) -> Subject:
    """All that is known about `adapter`. `views` holds the engines' modules, `unasked` why an engine was not asked;
    `engines` are those that it is judged for, by default all."""
    labels = labels_of(adapter, views or {})
    views = with_labels(views or {}, labels)
    adapter = with_default_targets(adapter, views)
    shapes = shapes_in(views)
    if shapes is None and base is not None:
        shapes = base.shapes or None
    places = {engine: predictors()[engine].resolve(view, adapter, serving) for engine, view in views.items()}
    judged = tuple(predictors()) if engines is None else tuple(engines)
    return Subject(adapter, serving, base, views, unasked or {}, shapes, places, judged, origin or Origin(), labels)
