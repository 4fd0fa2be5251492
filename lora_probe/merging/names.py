"""Matches the tensor names of base, merged model and adapter.

In: checkpoints, and module paths of an adapter. Out: the base's name for each path, and the merged model's name for
each of the base's. Files may have one prefix more or less than the live model (`transformer.`), and transformers
renames modules between file and model (`block_sparse_moe.gate` and `mlp.gate`); what follows the layer's number
identifies the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_probe.base import Checkpoint
from lora_probe.base.checkpoint import EMBEDDINGS
from lora_probe.errors import UnreadableFile
from lora_probe.names import LAYER

HEAD = "lm_head.weight"


class Names:
    """The tensor names of one checkpoint, for lookup."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self._after_first: dict[str, list[str]] = {}
        self._from_layer: dict[str, list[str]] = {}
        self._in_layer: dict[str, list[str]] = {}
        for name in self.names:
            self._after_first.setdefault(name.partition(".")[2], []).append(name)
            whole, end = _tails(name)
            self._from_layer.setdefault(whole, []).append(name)
            self._in_layer.setdefault(end, []).append(name)

    def find(self, name: str) -> str | None:
        """The tensor that matches `name`, if there is exactly one."""
        if name in self.names:
            return name
        shorter = name.partition(".")[2]
        if shorter in self.names:
            return shorter
        whole, end = _tails(name)
        groups = (self._after_first.get(name, []), self._from_layer.get(whole, []), self._in_layer.get(end, []))
        return next((match for group in groups if (match := _closest(name, group)) is not None), None)


def _tails(name: str) -> tuple[str, str]:
    """`3.mlp.gate.weight` and `3.gate.weight`: the path from the layer's number on, and its two ends. Without a number:
    the whole path, and `.embed_tokens.weight`."""
    match = LAYER.search(name)
    if match is None:
        return name, f".{'.'.join(name.split('.')[-2:])}"
    rest = name[match.end(1) + 1 :].split(".")
    return f"{match[1]}.{'.'.join(rest)}", f"{match[1]}.{'.'.join(rest[-2:])}"


def _closest(name: str, candidates: list[str]) -> str | None:
    """The candidate with the most words of `name`, if only one has them: a text layer, not the vision tower's."""
    if not candidates:
        return None
    words = set(name.split("."))
    shared = {candidate: len(words & set(candidate.split("."))) for candidate in candidates}
    best = [candidate for candidate in candidates if shared[candidate] == max(shared.values())]
    return best[0] if len(best) == 1 else None


def embeddings_of(base: Checkpoint) -> str | None:
    """The tensor of the input embeddings."""
    embeddings = [name for name in base.tensors if name.removesuffix(".weight").endswith(EMBEDDINGS)]
    return embeddings[0] if len(embeddings) == 1 else None


def tied_place(module: str, base: Checkpoint) -> str | None:
    """The tensor of a tied output head: the input embeddings. None for other modules."""
    if module.rpartition(".")[2] != HEAD.removesuffix(".weight") or not base.tied:
        return None
    return embeddings_of(base)


def aligned(base: Checkpoint, merged: Checkpoint) -> dict[str, str]:
    """Base name -> name in the merged model. All names may have one prefix more or less.

    Raises:
        UnreadableFile: for less than half of the base's tensors, the merged model has the same name and shape.
    """
    best: dict[str, str] = {}
    fits = -1
    for add, remove in _prefixes(base, merged):
        names = {name: f"{add}{name.removeprefix(remove)}" for name in base.tensors}
        matches = sum(
            other in merged.tensors and merged.tensors[other].shape == base.tensors[name].shape
            for name, other in names.items()
        )
        if matches > fits:
            best, fits = names, matches
    if fits * 2 < len(base.tensors):
        raise UnreadableFile(
            f"`{merged.path}` has another architecture than `{base.path}`: {fits} of {len(base.tensors)} "
            "tensors have the same name and shape",
            "pass the base model that the adapter was merged into with --model",
        )
    return best


def _prefixes(base: Checkpoint, merged: Checkpoint) -> list[tuple[str, str]]:
    """(prefix to add, prefix to remove): candidates that turn the base's names into the merged model's."""
    prefixes = [("", "")]
    for longer, shorter, adds in ((base, merged, False), (merged, base, True)):
        longest = max(longer.tensors, key=len)
        head = ""
        for part in longest.split(".")[:3]:
            head += f"{part}."
            if longest.removeprefix(head) in shorter.tensors:
                prefixes.append((head, "") if adds else ("", head))
    return prefixes
