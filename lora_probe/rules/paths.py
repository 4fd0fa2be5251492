"""Paths of modules as files hold them: what a sentence shows of them, and where two of them part.

In: names from a file or a base. Out: a list for a message, the beginnings of two paths, the words of wrappers.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_probe.files import shown


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names out of a file, in a sentence: `q_proj`, `v_proj` and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{shown(name)}`" for name in names[:most]) + more


def starts(stored_as: str, meant: str) -> tuple[str, str]:
    """What stands before the common end of two paths, and the first common word with it."""
    mine, theirs = stored_as.split("."), meant.split(".")
    common = 0
    while common < min(len(mine), len(theirs)) and mine[-1 - common] == theirs[-1 - common]:
        common += 1
    numbers = [i for i, word in enumerate(mine) if word.isdigit()]
    keep = len(mine) - numbers[0] if numbers else common
    keep = min(keep, common)
    return ".".join(mine[: len(mine) - keep]), ".".join(theirs[: len(theirs) - keep])


def wrapper_words(path: str) -> tuple[str, ...]:
    """The words of a path that are a wrapper's and no module's."""
    if not any(word in path for word in WRAPPERS):
        return ()
    return tuple(dict.fromkeys(word for word in path.split(".") if word in WRAPPERS))


def unwrapped(path: str) -> str:
    """The path without the words of wrappers."""
    return ".".join(word for word in path.split(".") if word not in WRAPPERS)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""What torch.compile, FSDP, activation checkpointing and DDP put into the names of a model that is not unwrapped."""
