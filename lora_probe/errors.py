"""Errors about an input, with a message for the user.

In: what is wrong (with a file, a tensor, an option) and what to do about it. Out: one exception, whose exit status the
command line returns. Only the command line prints.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path


class ProbeError(Exception):
    """One clear error: what is wrong and where; `hint` is what to do. Exit status 2 (nothing could be checked)."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UnreadableFile(ProbeError):
    """A file that is missing, damaged, or not of the type that its name suggests.

    `line` (from 1) and `key` are the place of the error in the file, if it is known."""

    def __init__(self, message: str, hint: str = "", *, line: int | None = None, key: str | None = None) -> None:
        super().__init__(message, hint)
        self.line = line
        self.key = key


class ModelNotFound(UnreadableFile):
    """A model that is neither a folder nor in the local cache."""


class NotLora(UnreadableFile):
    """An `adapter_config.json` of something that is not a PEFT LoRA adapter: another method, another library, a
    model."""


class ForeignWeights(NotLora):
    """An `adapter_config.json` of PEFT beside weights of another library, or of a whole model."""


class MissingWeights(UnreadableFile):
    """An adapter's config, but no weights in the places that loaders search."""


class TooLarge(ProbeError):
    """An input that is larger than in any real adapter. It is not read."""


class NeedsLibrary(ProbeError):
    """The request needs a library that is not installed. The input may be correct."""


class EngineFailed(ProbeError):
    """An engine that did not start, lacks its plugin, or died before it recorded anything."""


class EngineStopped(EngineFailed):
    """An engine's process that exceeded its limit of time or memory."""


def command(name: str, path: Path, *options: str) -> str:
    """One of our commands for a hint, so that it can be copied. A path that begins with a dash is not an option."""
    return command_line(["lora-probe", name, f"./{path}" if str(path).startswith("-") else str(path), *options])


def words_of(argument: str, value: object) -> list[str]:
    """A list argument of the Python interface: `prompts`, `select`. One string is a list of one, because its characters
    are never meant; None is an empty list.

    Raises:
        ProbeError: it is neither a string nor a list of strings.
    """
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    words = []
    for word in value if isinstance(value, Iterable) else [value]:
        if not isinstance(word, str):
            raise ProbeError(f"`{argument}` must be a string or a list of strings, not of {type(word).__name__}")
        words.append(word)
    return words


def out_of_memory(what: str) -> TooLarge:
    """The error for a MemoryError; `what` is the file, or the tensor in it."""
    return TooLarge(
        f"{what} needs more memory than is available",
        "raise the limit with --max-memory if the machine has enough",
    )


def command_line(words: Iterable[str]) -> str:
    """Words as a command for bash or zsh, on one line: line breaks and other control characters are written as in
    `$'...'`."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    inner = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(part if part.isprintable() else _escaped(part) for part in inner) + "'"


def _escaped(character: str) -> str:
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(character) or "".join(f"\\x{byte:02x}" for byte in character.encode(errors="surrogateescape"))
