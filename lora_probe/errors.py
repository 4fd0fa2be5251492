"""What goes wrong with an input, in words for the person who gave it.

In: the thing (a file, a tensor, an option) and what to do about it. Out: one exception whose exit status the
command line returns. Nothing below the command line prints.
"""

from __future__ import annotations


class ProbeError(Exception):
    """One clear error: what and where, and in `hint` what to do. Exit status 2 (nothing could be judged)."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UnreadableFile(ProbeError):
    """A file that is missing, damaged, or not what its name promises.

    `line` (from 1) and `key` are the place in the file that is wrong, where it is known."""

    def __init__(self, message: str, hint: str = "", *, line: int | None = None, key: str | None = None) -> None:
        super().__init__(message, hint)
        self.line = line
        self.key = key


class ModelNotFound(UnreadableFile):
    """A model that is neither a folder nor in the local cache."""


class NotLora(UnreadableFile):
    """An `adapter_config.json` of something that is no PEFT LoRA adapter: another method, another library, a model."""


class MissingWeights(UnreadableFile):
    """An adapter's config without weights where loaders look for them."""


class TooLarge(ProbeError):
    """An input larger than any real adapter has: it is not judged."""


class NeedsLibrary(ProbeError):
    """What is asked for needs a library that is not installed: nothing is wrong with the input."""


class EngineFailed(ProbeError):
    """An engine that did not start, lacks its plugin, or died before anything could be judged."""


class EngineStopped(EngineFailed):
    """An engine's process that took more time or memory than it may."""


def out_of_memory(what: str) -> TooLarge:
    """The error for a MemoryError; `what` is the file, or the tensor in it."""
    return TooLarge(
        f"{what} needs more memory than there is", "--max-memory raises the limit, as far as the machine goes"
    )
