"""LP3xx: heads and other whole modules that were trained beside the pairs. In: a `Subject`. Out: `AdapterFinding`s, and
`placed` of a pair on such a module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from lora_probe.files import shown
from lora_probe.rules.registry import AdapterFinding, rule, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.")
"""What PEFT's live model has in the names of a trained module, and `save_pretrained` removes."""


@survey(
    "LP319",
    "labels-differ",
    severity="warning",
    engines=("peft",),
    needs="base",
    hint="load the base model with the adapter's number of labels: `from_pretrained(base, num_labels=N)`",
)
def labels_differ(subject: Subject) -> Iterator[AdapterFinding]:
    """The adapter's classifier has another number of labels than the base model's config.

    What it does: compares the rows of the head in the file with the head that transformers builds from the base
    model's config (`num_labels` or `id2label`; 2 labels without them). The prediction assumes that the base is loaded
    with the adapter's number.

    Why it matters: the base model of a classifier usually has no head, so its config has no number of labels. PEFT
    0.21 then refuses the adapter with a size mismatch, unless the number is passed.

    Example: 5 labels on `bert-base-uncased`, loaded without `num_labels=5`.

    Fix: `AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)`, then `PeftModel.from_pretrained`.
    """
    labels = subject.labels
    if labels is not None:
        setting = f"num_labels={labels.of_adapter}"
        yield AdapterFinding(
            f"`{shown(labels.head)}` in the file has {_labels(labels.of_adapter)}, the base model's config gives "
            f"{labels.of_base}: PEFT refuses the adapter unless the base is loaded with {setting}",
            path=subject.adapter.weights.path,
            hint=f"load the base model with `{labels.class_name}.from_pretrained(base, {setting})`",
        )


def _labels(count: int) -> str:
    return "1 label" if count == 1 else f"{count} labels"


@rule(
    "LP321",
    "pair-on-a-whole-module",
    "placed",
    "absent",
    engines=("peft",),
    needs="base",
    hint="train again with the module in only one of target_modules and modules_to_save: PEFT keeps the whole module",
    field="modules_to_save",
)
def on_whole_module(whole: str) -> str:
    """The pair adapts a module that is trained as a whole, or a module inside of it.

    What it does: compares the names of pairs with `modules_to_save`. For classifiers PEFT adds `classifier` and `score`
    to it, whatever the config lists.

    Why it matters: PEFT 0.21 replaces the module by its trained copy and creates no LoRA layer in it, so it silently
    drops the pair. If the whole module is not in the file, PEFT fails with a KeyError (LP212).

    Example: `classifier.lora_A.weight` in an adapter of `SEQ_CLS`.
    """
    return f"PEFT drops the pair: `{shown(whole)}` is trained as a whole (modules_to_save)"


@survey(
    "LP322",
    "names-of-the-live-model",
    severity="warning",
    engines=("peft",),
    hint="save the adapter with `save_pretrained`: it writes `classifier.weight`",
)
def names_of_the_live_model(subject: Subject) -> Iterator[AdapterFinding]:
    """Tensors have names of PEFT's live model: `.modules_to_save.` or `.original_module.`.

    What it does: looks for both words in the names. A tensor under `.modules_to_save.` belongs to the trained module
    without that word; one under `.original_module.` is the frozen copy that PEFT keeps beside it.

    Why it matters: the state dict of the live model was saved. PEFT 0.21 silently drops what is named
    `.modules_to_save.`, also if it differs from the head that it loads; if the file holds no plain name for it, PEFT
    fails with a KeyError. The frozen copy and pairs on it never had any effect: they are not counted as lost.

    Example: `classifier.modules_to_save.bias` beside `classifier.bias`.

    Fix: remove `.modules_to_save` from the names, where the plain name is missing; delete the other tensors.
    """
    tensors = subject.adapter.weights.tensors
    plain = {name: _SAVED.sub(".", name) for name in tensors if _SAVED.search(name)}
    absent = {name: meant for name, meant in plain.items() if meant not in tensors}
    dropped = {name: meant for name, meant in plain.items() if meant in tensors}
    path = subject.adapter.weights.path
    if absent:
        yield AdapterFinding(
            f"PEFT looks for {_first(absent, 1)}, but the file has {_first(absent, 0)}",
            refuses=True,
            path=path,
            hint="remove `.modules_to_save` (and `.default` after it) from the names",
        )
    if dropped:
        yield AdapterFinding(
            f"PEFT silently drops {_first(dropped, 0)} and uses {_first(dropped, 1)}",
            path=path,
            hint="delete them if the tensors that PEFT uses are the trained ones; otherwise replace those by them",
        )


def _first(names: Mapping[str, str], which: int) -> str:
    pair = next(iter(names.items()))
    return f"`{shown(pair[which])}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
