"""What goes on while a command works, on standard error.

In: texts, and the progress of runs and comparisons. Out: a live line or a bar in a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from lora_probe.render.cells import words

if TYPE_CHECKING:
    from lora_probe.engines.launch import Progress
    from lora_probe.merging.weights import Progress as WeightsProgress


@contextmanager
def telling(first: str) -> Iterator[Callable[..., None]]:
    """What goes on, on standard error: a live line in a terminal, elsewhere a line for each lasting text."""
    console = Console(stderr=True)
    seen: list[str] = []
    with console.status(words(first)) as status:

        def tell(text: str, passing: bool = False) -> None:
            if console.is_terminal:
                status.update(words(text))
            elif not passing and [text] != seen[-1:]:
                seen.append(text)
                console.print(words(text), soft_wrap=True, highlight=False)

        yield tell


def following(engine: str, tell: Callable[..., None]) -> Callable[[Progress], None]:
    """Tells of a run: each new stage, then the answers so far."""

    def progress(now: Progress) -> None:
        if now.answers:
            tell(f"{engine}: {now.answers} of {now.wanted} answers")
        else:
            tell(f"{engine}: {now.stage}: {now.text}")

    return progress


def comparing(tell: Callable[..., None]) -> Callable[[WeightsProgress], None]:
    """Tells how much of both checkpoints has been compared, and how fast."""
    started: list[float] = []

    def progress(now: WeightsProgress) -> None:
        started.extend([] if started else [time.monotonic()])
        speed = now.done / max(time.monotonic() - started[0], 0.1) / 2**20
        share, whole = 100 * now.done / max(now.total, 1), now.total / 2**20
        tell(f"weights: {share:.0f} % of {whole:,.0f} MiB compared, {speed:,.0f} MiB/s", passing=now.done < now.total)

    return progress


@contextmanager
def working(what: str, steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, gone when the work is done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda: bar.advance(task)
