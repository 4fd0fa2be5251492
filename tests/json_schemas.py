"""The JSON Schemas in the package, and the check of an output against the one of its command.

In: the words of a command line, and its JSON. Out: an error if the JSON is not as the schema has it. With
JSON_SAMPLES set to a folder, the outputs are kept there for `record_schemas.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import jsonschema

import lora_probe.render.json

FOLDER = Path(lora_probe.render.json.__file__).parent / "schemas"
LARGEST = 20_000
"""Characters of an output that is validated here: jsonschema is slow."""


def name_of(words: Sequence[str], data: dict[str, Any]) -> str:
    """The name of the schema for what a command printed."""
    if set(data) == {"schema_version", "error"}:
        return "error"
    command = next((word for word in words if not word.startswith("-")), "")
    for key, name in (("first", "inspect-pair"), ("reports", "check-many"), ("renamed", "check-diff")):
        if key in data and name.startswith(command):
            return name
    if command == "inspect" and "--module" in words:
        return "inspect-module"
    if command == "show" and "--module" in words:
        return "show-module"
    if command == "show" and "measurements" in data:
        return "show-benchmark"
    if command == "compare" and "comparisons" in data:
        return "compare-adapters"
    return "trace" if command in ("show", "collect") else command


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    """The validator of one output, by its name."""
    return jsonschema.Draft202012Validator(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def require_valid(words: Sequence[str], output: str) -> None:
    """Check what `--format json` printed."""
    data = json.loads(output)
    name = name_of(words, data)
    if samples := os.environ.get("JSON_SAMPLES"):
        folder = Path(samples) / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{sha256(output.encode()).hexdigest()[:24]}.json").write_text(output)
        return
    if len(output) <= LARGEST:
        validator(name).validate(data)
