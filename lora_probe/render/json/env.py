"""JSON of `env`: versions.

In: versions by the names of their packages. Out: a plain dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_probe.render.json import SCHEMA_VERSION


def versions_json(versions: Mapping[str, str]) -> dict[str, Any]:
    """The versions as `env` lists them."""
    return {"schema_version": SCHEMA_VERSION, "versions": versions}
