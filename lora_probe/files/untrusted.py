"""Untrusted files: opened if they are regular files, refused otherwise, and never waited for.

In: a path. Out: the open file and its size, or one `UnreadableFile`; names from files, made safe to print; and the type
of a file with the right name and the wrong content (a Git LFS pointer, a web page, nothing at all).
"""

from __future__ import annotations

import os
import re
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from lora_probe.errors import UnreadableFile

LFS_MARK = b"version https://git-lfs"
_PAGE = (b"<!doctype html", b"<html", b"<?xml", b"<head")
HEAD = 512
"""Bytes of a file from which `wrong_file_type` recognises it."""
_LONGEST = 120
"""Characters of a name or a value in a message."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """The file and its size. Pipes and devices are refused before they are opened: reading them may never end.

    Raises:
        UnreadableFile: it is missing, not a regular file, or cannot be read, now or later in the block.
    """
    try:
        _require_regular(path, path.stat().st_mode)
        # A pipe that replaces the file between the two checks must not block either.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            _require_regular(path, status.st_mode)
            yield file, status.st_size
    except OSError as error:
        raise UnreadableFile(f"cannot read `{path}`: {error.strerror or error}") from error
    except ValueError as error:
        # Python itself refuses a NUL in a path.
        if "null byte" not in str(error):
            raise
        raise UnreadableFile(f"`{shown(str(path))}` is not a valid path: {error}") from error


def _require_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise UnreadableFile(f"cannot read `{path}`: Is a directory", "put a file in its place")
    if not stat.S_ISREG(mode):
        raise UnreadableFile(
            f"`{path}` is {_KINDS.get(stat.S_IFMT(mode), 'not a regular file')}, not a regular file",
            "replace it with a copy of the file",
        )


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def wrong_file_type(start: bytes, what: str) -> tuple[str, str] | None:
    """What a file is instead of `what`, by its first bytes, and the hint; None if they look right."""
    if not start:
        return "is empty (0 bytes)", "save or download it again"
    if start.startswith(LFS_MARK):
        return (
            f"is a Git LFS pointer, not {what}",
            "run `git lfs pull` in the repository it was cloned from",
        )
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:16].lower().startswith(_PAGE):
        return (
            f"is a web page, not {what}",
            "download the raw file; this is the web page of the file, or a login page",
        )
    if start.startswith(_GGUF):
        kind = "a llama.cpp LoRA adapter (GGUF)" if _GGUF_ADAPTER.search(start) else "a GGUF file of llama.cpp"
        return (
            f"is {kind}, not {what}",
            "PEFT and vLLM need the PEFT adapter that it was converted from; llama.cpp itself loads it",
        )
    if member := _NPY.match(start):
        mlx = re.search(rb"\.lora_[ab]\.npy$", member[1])
        return (
            f"is a NumPy archive (.npz){', as MLX wrote its adapters' if mlx else ''}, not {what}",
            "convert it; MLX stores lora_a and lora_b transposed" if mlx else "save it with safetensors",
        )
    return None


_GGUF = b"GGUF"
# A key, the type of its value (8: a string) and the value, with their lengths in front.
_GGUF_ADAPTER = re.compile(rb"general\.type\x08\0\0\0\x07\0\0\0\0\0\0\0adapter")
_NPY = re.compile(rb"PK\x03\x04.{26}([\w.-]+\.npy)", re.DOTALL)


def shown(name: str, longest: int = _LONGEST) -> str:
    """An untrusted name for a message: control characters escaped, cut to length."""
    text = name[: 4 * longest]
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text if len(text) <= longest and len(name) <= 4 * longest else f"{text[: longest - 3]}..."


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80
_brief.maxlist = _brief.maxdict = _brief.maxtuple = 6


def brief(value: object) -> str:
    """An untrusted value for a message: as Python writes it, cut to length and depth."""
    text = _brief.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: JSON and pickles can contain half a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def storage_of(folder: Path) -> Path:
    """Where the files of a (resolved) folder may be: inside it, or, for a hub's snapshot, inside its repository."""
    return folder.parent.parent if folder.parent.name == "snapshots" else folder


def sha256(path: Path) -> str:
    """The digest of a whole file as hexadecimal digits."""
    # Most commands digest no file, and their start would take longer.
    import hashlib

    with opened(path) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()
