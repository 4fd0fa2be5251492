"""LP7xx: the tensors of a merged model that the adapter does not change, and embeddings that are tied. Out: `merge`."""

from __future__ import annotations

import math

from lora_probe.files import shown
from lora_probe.rules.registry import rule


@rule(
    "LP708",
    "untouched-tensor-changed",
    "merge",
    "wrong",
    hint="the adapter does not touch this tensor: was another base merged into, or trained on?",
)
def untouched_changed(values: int, count: int, relative: float) -> str:
    """A tensor that the adapter does not touch differs from the base's.

    Why it matters: the merged model is not this base plus this adapter.
    """
    found = f"not the base's, though the adapter does not touch it: {values} of {count} values"
    return found if math.isnan(relative) else f"{found}, {relative:.2g} relative"


@rule(
    "LP709",
    "tensor-missing",
    "merge",
    "absent",
    hint="the save was cut short, or its names are another library's",
)
def tensor_missing(what: str) -> str:
    """A tensor of the base is not in the merged model, or has another shape there.

    Why it matters: loaders fill it with random values, and warn at most.
    """
    return what


@rule(
    "LP710",
    "tensor-added",
    "merge",
    "wrong",
    hint="a merged model has the tensors of its base; lora_ tensors mean that the adapter was saved unmerged",
)
def tensor_added() -> str:
    """The merged model holds a tensor that neither base nor adapter has.

    Why it matters: loaders ignore it, so that what it was meant to do does not happen; or it is no merge of this base.
    """
    return "neither the base nor the adapter has it"


@rule(
    "LP712",
    "tied-places-differ",
    "merge",
    "wrong",
    hint="write both places, or set tie_word_embeddings to false in the merged model's config.json",
    per_message=True,
)
def tied_places_differ(head: str, embedding: str) -> str:
    """The config ties input and output embeddings, and the files hold two different matrices.

    Why it matters: a loader takes one of the two for both, and which one differs between loaders.
    """
    return f"the config ties {shown(head)} to {shown(embedding)}, and the two differ"


@rule(
    "LP713",
    "tied-place-changed-too",
    "merge",
    "ok",
    severity="warning",
    hint="untie the base first (tie_word_embeddings=False) and merge into that; the outputs show what it costs",
    per_message=True,
)
def tied_changed_too(adapted: str) -> str:
    """The adapter changes one of two tied embeddings, and in the merged model both have changed.

    Why it matters: the unmerged adapter changes the input or the output only. PEFT merges into the shared matrix and
    warns when the adapter is made ("tied_target_modules"), not when it is merged.
    """
    return f"only {adapted} is adapted, and the merged model ties input and output embeddings: both have changed"


@rule(
    "LP714",
    "merged-into-another-base",
    "merge",
    "wrong",
    hint="name the base that was merged into with --model; the adapter's own is base_model_name_or_path",
    per_message=True,
)
def merged_into_another_base(differing: int, total: int) -> str:
    """Most tensors that no adapter touches differ: the merged model was made from another base.

    Why it matters: what the adapter did cannot be told from what the other base brings.
    """
    return f"{differing} of {total} tensors that the adapter does not touch are not this base's"
