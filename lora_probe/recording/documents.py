"""The JSON files of a trace. They are untrusted, so they are read within limits.

In: the path of a document, or of a file with a value in each line; and a msgspec type. Out: decoded values, or one
`UnreadableFile` with the file and the line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lora_probe.errors import UnreadableFile
from lora_probe.files import opened, shown
from lora_probe.files.limits import step

MAX_DOCUMENT = 64_000_000
"""Bytes of run.json, of process.json, and of one line. A run.json holds prompts and their token ids."""
MAX_LINES = 2**29
"""Bytes of events.jsonl or requests.jsonl. A load of 140,000 modules, an adapter on every expert, writes 0.1 GB."""
MAX_BRACKETS = 2_000_000
"""Objects and arrays in a document or a line: an empty array takes 3 bytes in a file and 60 in memory."""
MAX_DEPTH = 64
"""Levels of nesting in the free fields of a run or an event (`options`, `settings`, `facts`)."""

_KIND = re.compile(r"[a-z_]{1,40}")
"""What a newer version may call a kind of records."""

T = TypeVar("T")


def document(path: Path, kind: type[T]) -> T:
    """The value in a file that holds only one."""
    step("reading", path)
    with opened(path) as (file, size):
        if size > MAX_DOCUMENT:
            raise UnreadableFile(f"`{path}` has {size} bytes, more than the limit of {MAX_DOCUMENT}")
        data = file.read(size)
    try:
        return decoded(data, msgspec.json.Decoder(kind))
    except ValueError as error:
        raise UnreadableFile(f"cannot read `{path}`: {error}") from error


def lines(
    path: Path, decoder: msgspec.json.Decoder[T], wrong: Callable[[T], str], known: Collection[str] = ()
) -> list[T]:
    """The values of the complete lines of a file. `wrong` returns what is wrong with a decoded value, or "".

    A truncated last line is left by a killed process; any other bad line is an error. If `known` kinds are passed,
    lines of other kinds are skipped: a newer version wrote them.
    """
    values = []
    step("reading", path)
    with opened(path) as (file, size):
        if size > MAX_LINES:
            raise UnreadableFile(f"`{path}` has {size} bytes, more than the limit of {MAX_LINES}")
        for number, line in enumerate(iter(partial(file.readline, MAX_DOCUMENT), b""), 1):
            if not line.endswith(b"\n") and len(line) < MAX_DOCUMENT:
                break
            try:
                if len(line) == MAX_DOCUMENT:
                    raise ValueError(f"it has more than {MAX_DOCUMENT} bytes")
                value = decoded(line, decoder)
                if problem := wrong(value):
                    raise ValueError(problem)
            except ValueError as error:
                if known and (kind := _kind(line)) not in known and _KIND.fullmatch(kind):
                    continue
                raise UnreadableFile(f"`{path}`, line {number}: {error}") from error
            values.append(value)
    return values


class _Kind(msgspec.Struct):
    kind: str


def _kind(line: bytes) -> str:
    """The kind of a record; "" if the line is damaged."""
    try:
        return decoded(line, msgspec.json.Decoder(_Kind)).kind
    except ValueError:
        return ""


def decoded(data: bytes | str, decoder: msgspec.json.Decoder[T]) -> T:
    """The value of `data`.

    Raises:
        ValueError: its message is safe to print.
    """
    if len(data) > MAX_BRACKETS and _brackets(data) > MAX_BRACKETS:
        raise ValueError(f"it has more than {MAX_BRACKETS} arrays and objects")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise ValueError(shown(str(error), 200)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _brackets(data: bytes | str) -> int:
    return data.count("[") + data.count("{") if isinstance(data, str) else data.count(b"[") + data.count(b"{")


def too_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether lists and dictionaries are nested more than `levels` deep."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels == 0 or any(too_deep(inner, levels - 1) for inner in value)
