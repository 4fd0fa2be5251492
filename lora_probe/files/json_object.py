"""A JSON object from an untrusted file, and the line of each of its keys.

In: a path. Out: the object, or an error with the line; and each top-level key with its line, in the order of the text
(a repeated key appears as often as it is repeated). Values are skipped as tokens, so text in them never counts as a
key.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_probe.errors import UnreadableFile, out_of_memory
from lora_probe.files.limits import step
from lora_probe.files.untrusted import HEAD, opened, wrong_file_type

MAX_CONFIG = 10_000_000
"""Bytes; real ones have about a thousand."""

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:]', re.DOTALL)


def top_level(text: str) -> list[tuple[str, int]]:
    """The keys of the object and their lines, counted from 1."""
    keys: list[tuple[str, int]] = []
    depth, line, counted = 0, 1, 0
    last: re.Match[str] | None = None
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in "{[":
            depth += 1
        elif mark in "}]":
            depth -= 1
        # Outside of strings, a colon only follows a key.
        elif mark == ":" and depth == 1 and last is not None:
            line += text.count("\n", counted, last.start())
            counted = last.start()
            keys.append((json.loads(last[0]), line))
        last = token
    return keys


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from an untrusted file.

    Raises:
        UnreadableFile: missing, too large, not JSON (with the line), or not an object.
    """
    return parsed(path, read_text(path, limit))


def read_text(path: Path, limit: int = MAX_CONFIG) -> str:
    """The text of a JSON file, at most `limit` bytes of it. Raises as `read_json` does."""
    step("reading", path)
    with opened(path) as (file, size):
        data = file.read(size + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise UnreadableFile(
            f"`{path}` has {size} bytes, more than the limit of {limit}", "is it really a JSON config?"
        )
    if wrong := wrong_file_type(data[:HEAD], "JSON"):
        raise UnreadableFile(f"`{path}` {wrong[0]}", wrong[1])
    if data.startswith(b"\xef\xbb\xbf"):
        raise UnreadableFile(
            f"`{path}` begins with a byte order mark (UTF-8 with BOM), which PEFT and vLLM cannot read",
            f"save it as UTF-8 without BOM: sed -i '1s/^\\xEF\\xBB\\xBF//' {path.name}",
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte {error.start})"
        raise UnreadableFile(
            f"`{path}` is not valid JSON: it is {kind}, and JSON is UTF-8", "save it as UTF-8"
        ) from error


def parsed(path: Path, text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises as `read_json` does; `path` is only for the message."""
    again = "copy it again from where it was saved, or fix it in an editor"
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"in line {error.lineno}, column {error.colno}"
        raise UnreadableFile(f"`{path}` is not valid JSON: {error.msg} {where}", again, line=error.lineno) from error
    except (RecursionError, ValueError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UnreadableFile(f"`{path}` is not valid JSON: {why}", again) from error
    except MemoryError as error:
        raise out_of_memory(f"`{path}`") from error
    if not isinstance(raw, dict):
        raise UnreadableFile(f"`{path}` holds a JSON {type(raw).__name__}, not an object", again)
    return raw
