"""Writes the JSON Schemas of the package: `python tests/record_schemas.py SAMPLES`.

In: outputs that the tests kept (`JSON_SAMPLES=SAMPLES make test`), a folder for each kind of output. Out:
`lora_probe/render/json/schemas/*.json`. A field is required if all samples have it; more fields are allowed, so that
a program that reads the output of this version can read that of later ones.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from json_schemas import FOLDER

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null", list: "array"}
MAPS = re.compile(r"(^|\.)(ledger|not_served|versions|repeats\.\w+|comparisons|dtypes|renamed|left|rates)$")
"""Objects whose names are data: engines, packages, adapters."""
OPEN = re.compile(r"(^|\.)(options|settings|facts)$")
"""Objects whose names and values are those of engines: nothing is said about them."""


def schema_of(values: Sequence[Any], path: str = "") -> dict[str, Any]:
    """The schema of values in the same place."""
    kinds = {"object" if isinstance(value, dict) else TYPES[type(value)] for value in values}
    if "number" in kinds:
        # A number that was not measured, or is not finite, is null.
        kinds = (kinds | {"null"}) - {"integer"}
    if not kinds or kinds == {"null"}:
        # Nothing but null was seen there: nothing is known about it.
        return {}
    schema: dict[str, Any] = {"type": sorted(kinds) if len(kinds) > 1 else min(kinds)}
    if objects := [value for value in values if isinstance(value, dict)]:
        schema |= _object(objects, path)
    if "array" in kinds and (items := [item for value in values if isinstance(value, list) for item in value]):
        schema["items"] = schema_of(items, path)
    return schema


def _object(objects: Sequence[dict[str, Any]], path: str) -> dict[str, Any]:
    names = dict.fromkeys(name for value in objects for name in value)
    if OPEN.search(path):
        return {}
    if MAPS.search(path):
        return {
            "additionalProperties": schema_of([inner for value in objects for inner in value.values()], f"{path}.*")
        }
    inner = {name: schema_of([value[name] for value in objects if name in value], f"{path}.{name}") for name in names}
    return {"properties": inner, "required": [name for name in names if all(name in value for value in objects)]}


def main(samples: Path) -> None:
    FOLDER.mkdir(exist_ok=True)
    for folder in sorted(samples.iterdir()):
        values = [json.loads(path.read_text()) for path in folder.iterdir()]
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"lora-probe {folder.name}, --format json",
            **schema_of(values),
        }
        (FOLDER / f"{folder.name}.json").write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n")
        print(f"{folder.name}: {len(values)} samples")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
