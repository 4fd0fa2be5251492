"""control.json: a request to a running recording for another level of detail.

In: the folder of a run, and a level. Out: a file that every worker of the run reads about once a second, and the
answer of each in its process.json (`Process.control`).
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from lora_probe.recording.documents import document
from lora_probe.recording.records import SCHEMA, Level
from lora_probe.recording.writer import write_json

CONTROL = "control.json"


class Control(msgspec.Struct, frozen=True):
    """The last request for a run. `request` is different for each."""

    schema: int
    request: str
    keep: Level


def request_level(folder: Path, keep: Level) -> Control:
    """Request a level from all workers of a run."""
    control = Control(SCHEMA, os.urandom(8).hex(), keep)
    write_json(folder / CONTROL, control)
    return control


def requested_level(folder: Path) -> Control | None:
    """The last request for this run, if there is one.

    Raises:
        UnreadableFile: the file is damaged.
    """
    path = folder / CONTROL
    return document(path, Control) if os.path.lexists(path) else None
