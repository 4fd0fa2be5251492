"""JSON of `attach`: what the workers of an engine record from now on.

In: the answers of the workers. Out: a plain dictionary.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.results import Attachment


def attachment_json(result: Attachment) -> dict[str, Any]:
    """The level, and each worker with its level before."""
    return {"schema_version": SCHEMA_VERSION, **asdict(result)}
