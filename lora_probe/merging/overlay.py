"""The base as the adapter and the merged model see it.

In: base, merged model, adapter. Out: a `View`: the base with the tensors that the adapter carries as the base's own
(PEFT saves the weight of an adapted embedding, and loads it again: a resized vocabulary lies there), with those that
only adapter and merged model have (a classifier's head), and with a tied output head where the merged model has untied
it.
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
"""What PEFT writes a second time when it saves embeddings by itself."""
_BASE_LAYER = re.compile(r"\.(token_adapter\.)?base_layer\.(?=weight$)")


@dataclass(frozen=True)
class View:
    """`names`: base name -> name in the merged model. `others`: the adapter's tensors that are not the base's own;
    `inconsistent` is what is wrong with tied embeddings."""

    base: Checkpoint
    names: dict[str, str]
    others: tuple[OtherTensor, ...]
    inconsistent: Finding | None


def view(adapter: Adapter, base: Checkpoint, merged: Checkpoint) -> View:
    """The base to check against. Raises UnreadableFile as `names.aligned` does."""
    names = aligned(base, merged)
    base, inconsistent = _with_head(base, merged, names)
    known = Names(base.tensors)
    overlaid: dict[str, StoredTensor] = {}
    others = []
    for other, plain in _plain_names(adapter):
        home = known.find(plain) or tied_place(plain.removesuffix(".weight"), base)
        if _BASE_LAYER.search(other.tensor.name) and home is not None:
            overlaid[home] = _of(adapter, home, other.tensor)
            continue
        others.append(other)
        if _is_whole(other) and (home is None or base.tensors[home].shape != other.tensor.shape):
            home = home or plain
            if names.get(home, home) in merged.tensors:
                overlaid[home] = _of(adapter, home, other.tensor)
    for home in overlaid:
        names.setdefault(home, home)
    return View(replace(base, tensors={**base.tensors, **overlaid}), names, tuple(others), inconsistent)


def _plain_names(adapter: Adapter) -> Iterator[tuple[OtherTensor, str]]:
    """The adapter's tensors that are no pairs, and their names without PEFT's wrappers; copies are left out."""
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
    """The base with its tied output head as a tensor of its own where the merged model holds one that differs, and
    without a copy of it where the merged model holds one matrix for both."""
    embeddings = embeddings_of(base)
    if not base.tied or embeddings is None:
        return base, None
    if HEAD not in merged.tensors:
        return replace(base, tensors={name: t for name, t in base.tensors.items() if name != HEAD}), None
    one, two = merged.tensors.get(names[embeddings]), merged.tensors[HEAD]
    if one is None or equal(one, two):
        return base, None
    names[HEAD] = HEAD
    inconsistent = tied_places_differ(HEAD, embeddings) if merged.tied else None
    return replace(base, tensors={HEAD: replace(base.tensors[embeddings], name=HEAD), **base.tensors}), inconsistent
