"""The number of labels of a classifier: that of the adapter's head, and that of the base's config.

In: an adapter, and PEFT's view of its base. Out: `Labels` if the two differ, and the views with the adapter's number.
Transformers builds as many labels as the config has, 2 if it has none, unless `num_labels` is passed; the base of a
classifier is usually a model without a head, whose config has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from lora_probe.adapter import Adapter
from lora_probe.base import EngineView, ModuleView
from lora_probe.base.engine_view import CLASSIFIER_HEADS
from lora_probe.names import PREFIX


@dataclass(frozen=True)
class Labels:
    """`of_adapter` labels in the adapter's file at the module `head`, `of_base` by the config of the base. `model` is
    the class of transformers that the base is loaded as."""

    head: str
    of_adapter: int
    of_base: int
    model: str


def labels_of(adapter: Adapter, views: Mapping[str, EngineView]) -> Labels | None:
    """The labels of the adapter's classifier, if PEFT's model of the base has another number of them."""
    view = views.get("peft")
    if view is None:
        return None
    for head, module in view.modules.items():
        if module.kind == "linear" and module.shape is not None and _is_head(head):
            rows, columns = module.shape
            shape = _shape_in_file(adapter, head)
            if shape is not None and shape[1] == columns and shape[0] != rows:
                return Labels(head, shape[0], rows, view.model)
    return None


def with_labels(views: Mapping[str, EngineView], labels: Labels | None) -> Mapping[str, EngineView]:
    """The views, PEFT's with the adapter's number of labels: whoever loads a classifier passes its number."""
    if labels is None:
        return views
    head = views["peft"].modules[labels.head]
    assert head.shape is not None
    resized: dict[str, ModuleView] = {labels.head: replace(head, shape=(labels.of_adapter, head.shape[1]))}
    return {**views, "peft": replace(views["peft"], modules=views["peft"].modules | resized)}


def labels_in(adapter: Adapter) -> int | None:
    """How many labels the adapter's classifier has; None if it has none."""
    heads = (f"{head}{end}" for head in CLASSIFIER_HEADS for end in ("", ".out_proj"))
    return next((shape[0] for head in heads if (shape := _shape_in_file(adapter, head)) is not None), None)


def _is_head(module: str) -> bool:
    """Whether a module has a row for each label: the head itself, or the last projection of a head of several."""
    first, _, last = module.partition(".")
    return first in CLASSIFIER_HEADS and last in ("", "out_proj")


def _shape_in_file(adapter: Adapter, module: str) -> tuple[int, int] | None:
    """The shape `(labels, hidden size)` of a head's weight by its whole weight in the file, or by its pair."""
    whole = adapter.weights.tensors.get(f"{PREFIX}{module}.weight")
    if whole is not None and len(whole.shape) == 2:
        return whole.shape[0], whole.shape[1]
    pair = next((pair for pair in adapter.modules if pair.module == module and pair.matrices), None)
    if pair is None or pair.inputs is None or pair.b is None:
        return None
    return pair.b.shape[0], pair.inputs
