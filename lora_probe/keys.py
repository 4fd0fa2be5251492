"""Where the keys of a JSON object stand in its text.

In: the text of an object that Python's json has accepted. Out: each top-level key with its line, in the order of the
text, a key that is repeated once for each time. Values are skipped as tokens: what they say is never taken for a key.
"""

from __future__ import annotations

import json
import re

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:]', re.DOTALL)


def top_level(text: str) -> list[tuple[str, int]]:
    """The keys of the object and their lines, counted from 1."""
    found: list[tuple[str, int]] = []
    depth, line, counted = 0, 1, 0
    last: re.Match[str] | None = None
    for token in _TOKEN.finditer(text):
        mark = token[0]
        if mark in "{[":
            depth += 1
        elif mark in "}]":
            depth -= 1
        # A colon outside of a string follows a key, and nothing else.
        elif mark == ":" and depth == 1 and last is not None:
            line += text.count("\n", counted, last.start())
            counted = last.start()
            found.append((json.loads(last[0]), line))
        last = token
    return found
