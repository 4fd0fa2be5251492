"""`env` as text: the versions for a bug report.

In: versions by the names of their packages. Out: a rich renderable.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType

from lora_probe.render.cells import paragraphs


def versions(result: Mapping[str, str]) -> RenderableType:
    """One line per package."""
    return paragraphs("\n".join(f"{name} {number}" for name, number in result.items()))
