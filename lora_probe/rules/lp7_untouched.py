"""LP7xx: the tensors of a merged model that the adapter does not change, and tied embeddings. Out: `merge`."""

from __future__ import annotations

import math

from lora_probe.files import shown
from lora_probe.rules.registry import rule


@rule(
    "LP708",
    "untouched-tensor-changed",
    "merge",
    "wrong",
    hint="check whether the merge or a later training used another base model: the adapter does not change this tensor",
)
def untouched_changed(values: int, count: int, relative: float) -> str:
    """A tensor that the adapter does not change differs from the base model's.

    Why it matters: the merged model is not this base model plus this adapter.
    """
    message = f"not equal to the base model, although the adapter does not change it: {values} of {count} values differ"
    return message if math.isnan(relative) else f"{message}, {relative:.2g} relative"


@rule(
    "LP709",
    "tensor-missing",
    "merge",
    "absent",
    hint="save the merged model again: the save was cut short, or another library wrote the names",
)
def tensor_missing(what: str) -> str:
    """A tensor of the base model is missing in the merged model, or has another shape there.

    Why it matters: loaders fill it with random values, and at most print a warning.
    """
    return what


@rule(
    "LP710",
    "tensor-added",
    "merge",
    "wrong",
    hint="merge again if it is a lora_ tensor: then the adapter was saved unmerged",
)
def tensor_added() -> str:
    """The merged model contains a tensor that neither the base model nor the adapter has.

    Why it matters: loaders ignore it, so it has no effect; or the model is not a merge of this base model.
    """
    return "neither the base nor the adapter has it"


@rule(
    "LP712",
    "tied-places-differ",
    "merge",
    "wrong",
    hint="write both matrices, or set tie_word_embeddings to false in the merged model's config.json",
    per_message=True,
)
def tied_places_differ(head: str, embedding: str) -> str:
    """The config ties input and output embeddings, but the files hold two different matrices.

    Why it matters: a loader uses one of the two for both, and loaders differ in which one.
    """
    return f"the config ties {shown(head)} to {shown(embedding)}, but the two differ"


@rule(
    "LP713",
    "tied-place-changed-too",
    "merge",
    "ok",
    severity="warning",
    hint="untie the base model first (tie_word_embeddings=False) and merge into that; the outputs show the difference",
    per_message=True,
)
def tied_changed_too(adapted: str) -> str:
    """The adapter changes one of two tied embeddings, and in the merged model both have changed.

    Why it matters: the unmerged adapter changes only the input or only the output. PEFT merges into the shared matrix
    and warns when the adapter is created ("tied_target_modules"), not when it is merged.
    """
    return f"only {adapted} is adapted, and the merged model ties input and output embeddings: both have changed"


@rule(
    "LP714",
    "merged-into-another-base",
    "merge",
    "wrong",
    hint="pass the base model of the merge with --model; the adapter's own is base_model_name_or_path",
    per_message=True,
)
def merged_into_another_base(differing: int, total: int) -> str:
    """Most tensors that no adapter changes differ: the merged model was made from another base model.

    Why it matters: the effect of the adapter cannot be separated from that of the other base model.
    """
    return f"{differing} of {total} tensors that the adapter does not change differ from this base model's"
