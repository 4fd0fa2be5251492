"""Paths of modules as files hold them: how a message lists them, and where two of them differ.

In: names from a file or a base. Out: a list for a message, the different starts of two paths, the words of wrappers.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_probe.files import shown


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


def wrapper_words(path: str) -> tuple[str, ...]:
    """The words of a path that come from a wrapper, not from the model."""
    if not any(word in path for word in WRAPPERS):
        return ()
    return tuple(dict.fromkeys(word for word in path.split(".") if word in WRAPPERS))


def unwrapped(path: str) -> str:
    """The path without the words of wrappers."""
    return ".".join(word for word in path.split(".") if word not in WRAPPERS)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""What torch.compile, FSDP, activation checkpointing and DDP add to the names of a model that is not unwrapped."""
