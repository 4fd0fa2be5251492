"""LP3xx: heads and other whole modules that were trained beside the pairs. In: a `Subject`. Out: `AdapterFinding`s, and
`placed` of a pair on such a module."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from lora_probe.adapter.pattern_index import beginnings
from lora_probe.adapter.saved import names_without_pairs, saved_names, saves_module, saves_tensor
from lora_probe.files import shown
from lora_probe.files.values import read_chunk, widen
from lora_probe.names import PREFIX
from lora_probe.rules.lp2_files import CHUNK
from lora_probe.rules.paths import RENAME, bare
from lora_probe.rules.registry import AdapterFinding, rule, survey, whole

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
            hint=f"load the base model with `{labels.model}.from_pretrained(base, {setting})`",
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
def on_whole_module(trained: str) -> str:
    """The pair adapts a module that is trained as a whole, or a module inside of it.

    What it does: compares the names of pairs with `modules_to_save`. For classifiers PEFT adds `classifier` and `score`
    to it, whatever the config lists.

    Why it matters: PEFT 0.21 replaces the module by its trained copy and creates no LoRA layer in it, so it silently
    drops the pair. If the whole module is not in the file, PEFT fails with a KeyError. So it does for
    a head that was saved inside of a LoRA layer, as `classifier.base_layer.weight`.

    Example: `classifier.lora_A.weight` in an adapter of `SEQ_CLS`.
    """
    return f"PEFT drops the pair: `{shown(trained)}` is trained as a whole (modules_to_save)"


@whole("LP321")
def without_the_whole_module(subject: Subject) -> Iterator[AdapterFinding]:
    """PEFT fails if a pair is all that the file holds of such a module."""
    config, tensors = subject.adapter.config, subject.adapter.weights.tensors
    view = subject.views.get("peft")
    names = names_without_pairs(config.raw)
    if view is None or not names:
        return
    for pair in subject.adapter.modules:
        trained = whole_module(names, pair.module)
        plain = f"{PREFIX}{pair.module}.weight"
        if trained is not None and pair.module in view.modules and plain not in tensors:
            yield AdapterFinding(
                f"PEFT looks for `{shown(plain)}`, because `{shown(trained)}` is trained as a whole (modules_to_save), "
                "but the file has only a pair there",
                refuses=True,
            )
            return


def whole_module(names: tuple[str, ...], module: str) -> str | None:
    """The module that PEFT trains as a whole, by `names` of modules_to_save, and that `module` is or is inside of."""
    return next((path for path in (module, *beginnings(module)) if saves_module(names, path)), None) if names else None


@survey(
    "LP322",
    "whole-module-misnamed",
    engines=("peft",),
    hint=RENAME,
    fixable=True,
    explains=("LP210", "LP213", "LP214", "LP215"),
)
def whole_module_misnamed(subject: Subject) -> Iterator[AdapterFinding]:
    """A whole module is not stored under the name that PEFT looks for.

    What it does: looks for tensors of `modules_to_save` under names of the live model (`.modules_to_save.`), with a
    wrapper's name, and with PEFT's prefix missing or doubled. PEFT adds `classifier`, `score` and `qa_outputs` to
    `modules_to_save` for some tasks.

    Why it matters: PEFT 0.21 looks for the plain name and fails with a KeyError.

    Example: `classifier.modules_to_save.default.weight` instead of `classifier.weight`: the state dict of the live
    model was saved, not the output of `save_pretrained`.
    """
    names, tensors = saved_names(subject.adapter.config.raw), subject.adapter.weights.tensors
    misnamed = {}
    for name in tensors if names else ():
        meant = meant_of_whole(name, tensors)
        if ".lora_" not in name and meant not in tensors and saves_tensor(names, bare(meant)):
            misnamed[name] = meant
    if misnamed:
        message = f"PEFT looks for {_first(misnamed, 1)}, but the file has {_first(misnamed, 0)}"
        yield AdapterFinding(message, refuses=True, path=subject.adapter.weights.path)


def meant_of_whole(name: str, tensors: Container[str]) -> str:
    """The name under which `save_pretrained` writes a tensor of a whole module. The second copy of one stays such."""
    plain = _SAVED.sub(".", name)
    return PREFIX + bare(name if plain != name and plain in tensors else plain)


@survey(
    "LP323",
    "second-copy-of-a-head",
    severity="warning",
    engines=("peft",),
    hint="delete them if the tensors that PEFT uses are the trained ones; otherwise replace those by them",
)
def second_copy_of_a_head(subject: Subject) -> Iterator[AdapterFinding]:
    """The file holds tensors of a whole module twice: under the plain name, and with `.modules_to_save.`.

    What it does: looks for names of PEFT's live model beside the plain ones. `.original_module.`, the frozen copy that
    PEFT keeps beside a trained module, has no effect in training or in PEFT, and is not reported.

    Why it matters: PEFT 0.21 silently drops the tensors with `.modules_to_save.` in their names, even if only they were
    trained.

    Example: `classifier.modules_to_save.bias` beside `classifier.bias`.
    """
    tensors = subject.adapter.weights.tensors
    plain = {name: _SAVED.sub(".", name) for name in tensors if _SAVED.search(name)}
    present = {name: meant for name, meant in plain.items() if meant in tensors}
    if present:
        message = f"PEFT silently drops {_first(present, 0)} and uses {_first(present, 1)}"
        yield AdapterFinding(message, path=subject.adapter.weights.path)


def _first(names: Mapping[str, str], which: int) -> str:
    pair = next(iter(names.items()))
    return f"`{shown(pair[which])}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


@survey(
    "LP324",
    "whole-module-does-not-fit",
    engines=("peft",),
    needs="base",
    hint="pass the base model that it was trained on, or restore the tensor: PEFT requires exactly this shape",
)
def whole_module_does_not_fit(subject: Subject) -> Iterator[AdapterFinding]:
    """A whole module in the file has another shape than in the base model.

    What it does: compares the weights of modules_to_save, and of the heads that PEFT adds to it, with the base model's.
    The number of labels is compared by LP319, the vocabulary by LP308.

    Why it matters: PEFT 0.21 refuses the adapter with a size mismatch.
    """
    view, names = subject.views.get("peft"), saved_names(subject.adapter.config.raw)
    if view is None or not names:
        return
    for name, tensor in subject.adapter.weights.tensors.items():
        path = name.removeprefix(PREFIX)
        module = view.modules.get(path.removesuffix(".weight"))
        if module is None or module.kind != "linear" or module.shape is None or name != f"{PREFIX}{path}":
            continue
        if path.endswith(".weight") and saves_tensor(names, path) and tensor.shape != module.shape:
            shapes = f"shape {list(tensor.shape)}, the base model's has {list(module.shape)}"
            yield AdapterFinding(f"`{shown(name)}` has {shapes}", refuses=True, path=subject.adapter.weights.path)
            return


@survey(
    "LP326",
    "whole-module-not-finite",
    engines=("peft",),
    hint="use an earlier checkpoint, or train again with a lower learning rate",
)
def whole_module_not_finite(subject: Subject) -> Iterator[AdapterFinding]:
    """A whole module in the file contains NaN or infinity.

    What it does: reads the values of modules_to_save, and of the heads that PEFT adds to it. Pairs are LP205.

    Why it matters: PEFT 0.21 loads it silently, and every output of the model is NaN.
    """
    file, names = subject.adapter.weights, saved_names(subject.adapter.config.raw)
    for name, tensor in file.tensors.items() if names else ():
        if ".lora_" in name or not saves_tensor(names, bare(name)):
            continue
        for start in range(0, tensor.parameters, CHUNK):
            values = read_chunk(file, tensor, start, min(start + CHUNK, tensor.parameters))
            if not np.isfinite(widen(values, tensor.dtype)).all():
                yield AdapterFinding(f"`{shown(name)}` contains NaN or infinity", path=file.path)
                return
