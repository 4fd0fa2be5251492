"""Which tensor is meant: names of base, merged model and adapter brought together.

In: checkpoints, and module paths as an adapter has them. Out: the base's name for each, and the merged model's for each
of the base's. Files may have one prefix more or less than the live model (`transformer.`), and transformers renames
modules between file and model (`block_sparse_moe.gate` and `mlp.gate`); from the layer's number on the end of a path
tells what is meant.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_probe.base import Checkpoint
from lora_probe.base.checkpoint import EMBEDDINGS
from lora_probe.errors import UnreadableFile
from lora_probe.names import LAYER

HEAD = "lm_head.weight"


class Names:
    """The tensor names of one checkpoint, to be asked for."""

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
        """The tensor that `name` means, if there is exactly one."""
        if name in self.names:
            return name
        shorter = name.partition(".")[2]
        if shorter in self.names:
            return shorter
        whole, end = _tails(name)
        groups = (self._after_first.get(name, []), self._from_layer.get(whole, []), self._in_layer.get(end, []))
        return next((found for group in groups if (found := _closest(name, group)) is not None), None)


def _tails(name: str) -> tuple[str, str]:
    """`3.mlp.gate.weight` and `3.gate.weight`: the path from the layer's number on, and its ends. Without a number:
    the path, and `.embed_tokens.weight`."""
    match = LAYER.search(name)
    if match is None:
        return name, f".{'.'.join(name.split('.')[-2:])}"
    rest = name[match.end(1) + 1 :].split(".")
    return f"{match[1]}.{'.'.join(rest)}", f"{match[1]}.{'.'.join(rest[-2:])}"


def _closest(name: str, candidates: list[str]) -> str | None:
    """The one candidate that shares most words with `name`: a text layer, not the vision tower's of the same number."""
    if not candidates:
        return None
    words = set(name.split("."))
    shared = {candidate: len(words & set(candidate.split("."))) for candidate in candidates}
    best = [candidate for candidate in candidates if shared[candidate] == max(shared.values())]
    return best[0] if len(best) == 1 else None


def embeddings_of(base: Checkpoint) -> str | None:
    """The tensor of the input embeddings."""
    found = [name for name in base.tensors if name.removesuffix(".weight").endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None


def tied_place(module: str, base: Checkpoint) -> str | None:
    """Where a tied output head lies: in the input embeddings."""
    if module.rpartition(".")[2] != HEAD.removesuffix(".weight") or not base.tied:
        return None
    return embeddings_of(base)


def aligned(base: Checkpoint, merged: Checkpoint) -> dict[str, str]:
    """Base name -> name in the merged model; one prefix more or less on all names is the same architecture.

    Raises:
        UnreadableFile: hardly a tensor of the base has a namesake of its shape.
    """
    best: dict[str, str] = {}
    fits = -1
    for add, remove in _prefixes(base, merged):
        names = {name: f"{add}{name.removeprefix(remove)}" for name in base.tensors}
        found = sum(
            other in merged.tensors and merged.tensors[other].shape == base.tensors[name].shape
            for name, other in names.items()
        )
        if found > fits:
            best, fits = names, found
    if fits * 2 < len(base.tensors):
        raise UnreadableFile(
            f"`{merged.path}` is of another architecture than `{base.path}`: {fits} of {len(base.tensors)} "
            "tensors have a namesake of the same shape in it",
            "name the base that was merged into with --model",
        )
    return best


def _prefixes(base: Checkpoint, merged: Checkpoint) -> list[tuple[str, str]]:
    """(prefix to add, prefix to remove) that may turn the base's names into the merged model's."""
    found = [("", "")]
    for one, other, adds in ((base, merged, False), (merged, base, True)):
        longest = max(one.tensors, key=len)
        head = ""
        for part in longest.split(".")[:3]:
            head += f"{part}."
            if longest.removeprefix(head) in other.tensors:
                found.append((head, "") if adds else ("", head))
    return found
