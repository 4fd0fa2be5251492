"""`attach` as text: what the workers of an engine record from now on.

In: the answers of the workers. Out: lines of text.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType

from lora_probe.render.cells import words
from lora_probe.render.results import Attachment


def attachment(result: Attachment) -> RenderableType:
    """A line for each worker, and why contributions are not recorded."""
    return Group(*_lines(result))


def _lines(result: Attachment) -> Iterator[RenderableType]:
    for worker in result.workers:
        yield words(f"{worker.name} records {result.keep} from the next step on (until now: {worker.before})")
    reasons = dict.fromkeys(worker.not_recorded for worker in result.workers)
    for reason in filter(None, reasons if result.keep != "events" else ()):
        yield words(f"contributions not recorded: {reason}", style="bold yellow")
