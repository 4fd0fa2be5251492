"""Where a diagnostic points, as its readers' tools expect it: relative to the current folder.

In: the path of a file or folder. Out: the same path relative to the current folder, or absolute if it is elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.adapter import CONFIG

if TYPE_CHECKING:
    from lora_probe.checking import Report
    from lora_probe.rules import Diagnostic


def relative(path: str | Path) -> str:
    """The path relative to the current folder. A relative path that leads elsewhere stays as it is."""
    near = os.path.relpath(path)
    return str(Path(path)) if _outside(near) or not Path(path).is_absolute() else near


def uri(path: str | Path) -> str:
    """The path as a URI reference: relative inside the current folder, else `file:`."""
    from urllib.parse import quote

    near = os.path.relpath(path)
    if _outside(near):
        return "file://" + quote(os.fsencode(Path.cwd() / path))
    return quote(os.fsencode(near))


def file_of(report: Report, diagnostic: Diagnostic) -> str:
    """The file that the diagnostic is about, by default the config."""
    return diagnostic.path or str(report.adapter / CONFIG)


def _outside(near: str) -> bool:
    return Path(near).parts[:1] == (os.pardir,)
