"""The base model as adapter and merged model expect it.

In: base, merged model, adapter. Out: a `View`: the base; the tensors that the adapter stores in place of the base's
(PEFT saves and reloads the weight of an adapted embedding, which may have a resized vocabulary); those that only
adapter and merged model have (a classification head); and a separate output head if the merged model has untied it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_probe.adapter import Adapter, OtherTensor
from lora_probe.base import Checkpoint, StoredTensor
from lora_probe.base.checkpoint import of_header
from lora_probe.files.weights import TensorHeader
from lora_probe.ledger import Finding
from lora_probe.merging.names import HEAD, Names, aligned, embeddings_of, tied_place
from lora_probe.merging.untouched import equal
from lora_probe.names import PREFIX
from lora_probe.rules.lp7_untouched import tied_places_differ

_COPY = re.compile(r"\.(original_module|modules_to_save)\.")
"""Copies that PEFT writes when it saves embeddings automatically."""
_BASE_LAYER = re.compile(r"\.(token_adapter\.)?base_layer\.(?=weight$)")


@dataclass(frozen=True)
class View:
    """`names`: base name -> name in the merged model. `others`: the adapter's tensors that do not replace the base's.
    `inconsistent`: the finding if tied embeddings differ."""

    base: Checkpoint
    names: dict[str, str]
    others: tuple[OtherTensor, ...]
    inconsistent: Finding | None


def view(adapter: Adapter, base: Checkpoint, merged: Checkpoint) -> View:
    """The base to check against. Raises UnreadableFile as `names.aligned` does."""
    names = aligned(base, merged)
    base, inconsistent = _with_head(base, merged, names)
    base_names = Names(base.tensors)
    overlaid: dict[str, StoredTensor] = {}
    others = []
    for other, plain in _plain_names(adapter):
        name = base_names.find(plain) or tied_place(plain.removesuffix(".weight"), base)
        if _BASE_LAYER.search(other.tensor.name) and name is not None:
            overlaid[name] = _of(adapter, name, other.tensor)
            continue
        others.append(other)
        if _is_whole(other) and (name is None or base.tensors[name].shape != other.tensor.shape):
            name = name or plain
            if names.get(name, name) in merged.tensors:
                overlaid[name] = _of(adapter, name, other.tensor)
    for name in overlaid:
        names.setdefault(name, name)
    return View(replace(base, tensors={**base.tensors, **overlaid}), names, tuple(others), inconsistent)


def _plain_names(adapter: Adapter) -> Iterator[tuple[OtherTensor, str]]:
    """The adapter's tensors outside of A and B, with their names without PEFT's wrappers. Copies are left out."""
    present = {other.tensor.name for other in adapter.others}
    for other in adapter.others:
        name = other.tensor.name
        if _COPY.search(name) and (".original_module." in name or _COPY.sub(".", name) in present):
            continue
        yield other, _BASE_LAYER.sub(".", name.removeprefix(PREFIX))


def _is_whole(other: OtherTensor) -> bool:
    return other.understood and "trainable_tokens" not in other.tensor.name


def _of(adapter: Adapter, name: str, header: TensorHeader) -> StoredTensor:
    return of_header(adapter.weights, header, name)


def _with_head(base: Checkpoint, merged: Checkpoint, names: dict[str, str]) -> tuple[Checkpoint, Finding | None]:
    """The base with a separate output head if the merged model stores one that differs from its embeddings, and without
    the copy of a tied head if the merged model stores one matrix for both."""
    embeddings = embeddings_of(base)
    if not base.tied or embeddings is None:
        return base, None
    if HEAD not in merged.tensors:
        return replace(base, tensors={name: t for name, t in base.tensors.items() if name != HEAD}), None
    embedding, head = merged.tensors.get(names[embeddings]), merged.tensors[HEAD]
    if embedding is None or equal(embedding, head):
        return base, None
    names[HEAD] = HEAD
    inconsistent = tied_places_differ(HEAD, embeddings) if merged.tied else None
    tensors = {HEAD: replace(base.tensors[embeddings], name=HEAD), **base.tensors}
    return replace(base, tensors=tensors), inconsistent
