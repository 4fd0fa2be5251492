"""JSON of an error: a command that ended with status 2.

In: the error. Out: a plain dictionary:

    {"schema_version": 1, "error": {"message": ..., "hint": ...}}

`hint` is empty if there is none, and may have several lines. `check` of several adapters and `show` have their whole
document instead, with the same `error` in it.
"""

from __future__ import annotations

from typing import Any

from lora_probe.errors import ProbeError
from lora_probe.render.json import SCHEMA_VERSION


def error_json(error: ProbeError) -> dict[str, Any]:
    """The document of a command that has no other output."""
    return {"schema_version": SCHEMA_VERSION, "error": message_json(error)}


def message_json(error: ProbeError) -> dict[str, str]:
    """The message and the hint."""
    return {"message": error.message, "hint": error.hint}
