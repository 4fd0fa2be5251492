"""Paths of modules as files hold them: how a message lists them, and where two of them differ.

In: names from a file or a base. Out: a list for a message, the different starts of two paths, the words of wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lora_probe.files import shown
from lora_probe.names import PREFIX

RENAME = "rename the keys: `lora-probe check --fix -o FIXED/` does it"
"""The hint of rules about names that `--fix` corrects."""


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names from a file, in a sentence: `q_proj`, `v_proj` and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{shown(name)}`" for name in names[:most]) + more


def starts(stored_as: str, meant: str) -> tuple[str, str]:
    """The parts of two paths before their common end, each with the first common word."""
    ours, theirs = stored_as.split("."), meant.split(".")
    common = 0
    while common < min(len(ours), len(theirs)) and ours[-1 - common] == theirs[-1 - common]:
        common += 1
    numbers = [i for i, word in enumerate(ours) if word.isdigit()]
    keep = len(ours) - numbers[0] if numbers else common
    keep = min(keep, common)
    return ".".join(ours[: len(ours) - keep]), ".".join(theirs[: len(theirs) - keep])


def difference(stored_as: str, meant: str, source: str = "the file") -> str:
    """How a path in the file, or in another `source`, differs from that of the module which was meant, in a
    sentence."""
    if words := changed_words(stored_as, meant):
        old, new = (listed([*names]) for names in (words, words.values()))
        return f"the names in {source} have {old} where the base model has {new}"
    file_start, base_start = starts(stored_as, meant)
    if not file_start or not base_start:
        lacking, having = (source, base_start) if not file_start else ("the model", file_start)
        return f"the names in {lacking} lack `{shown(having)}` at the beginning"
    return f"the names in {source} begin with `{shown(file_start)}`, the model's with `{shown(base_start)}`"


def changed_words(stored_as: str, meant: str) -> dict[str, str]:
    """The words of a path in the file that the module which was meant has others for; none if only what stands before
    the layers differs."""
    ours, theirs = bare(stored_as).split("."), meant.split(".")
    if len(ours) != len(theirs):
        ours, theirs = from_number_on(ours), from_number_on(theirs)
    if len(ours) != len(theirs) or from_number_on(ours) == from_number_on(theirs):
        return {}
    return {word: other for word, other in zip(ours, theirs, strict=True) if word != other}


def from_number_on(words: list[str]) -> list[str]:
    """The words of a path from its first number on; without a number the last one."""
    first = next((i for i, word in enumerate(words) if word.isdecimal()), len(words) - 1)
    return words[first:]


def bare(path: str) -> str:
    """The path of a module, or of a tensor of it, without PEFT's prefix and without what wrappers add."""
    return unwrapped(path.replace(PREFIX, ""))


def wrapper_words(path: str) -> tuple[str, ...]:
    """The words of a path that come from a wrapper, not from the model."""
    words = [word for word in path.split(".") if word in WRAPPERS]
    if _INNER.search(path):
        words.append("base_layer")
    return tuple(dict.fromkeys(words))


def unwrapped(path: str) -> str:
    """The path without the words of wrappers."""
    return ".".join(word for word in _INNER.sub("", path).split(".") if word not in WRAPPERS)


_INNER = re.compile(r"(?<!\.experts)(?:\.base_layer)+(?=\.lora_|$)")
"""What PEFT adds to the path of a layer that it has wrapped already. Of fused experts, and of whole embeddings
(`lm_head.base_layer.weight`), it belongs to the name."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""What torch.compile, FSDP, activation checkpointing and DDP add to the names of a model that is not unwrapped."""
