"""The progress of a command, on standard error.

In: texts, and the progress of runs and comparisons. Out: a live line or a bar in a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from lora_probe.render.cells import words
from lora_probe.render.console import detail

if TYPE_CHECKING:
    from lora_probe.engines.launch import Progress
    from lora_probe.merging.weights import Progress as WeightsProgress


@contextmanager
def status_line(first: str) -> Iterator[Callable[..., None]]:
    """Report the current step: a live line in a terminal, elsewhere one line per text that is not `passing`."""
    console = Console(stderr=True, quiet=detail() == "quiet")
    last = ""
    with console.status(words(first)) as status:

        def report(text: str, passing: bool = False) -> None:
            nonlocal last
            if console.is_terminal:
                status.update(words(text))
            elif not passing and text != last:
                last = text
                console.print(words(text), soft_wrap=True, highlight=False)

        yield report


def run_progress(engine: str, report: Callable[..., None]) -> Callable[[Progress], None]:
    """Reports a run: each new stage, then the number of answers so far and the time left. A log has the last one."""
    first: list[tuple[float, int]] = []

    def progress(now: Progress) -> None:
        if not now.answers:
            report(f"{engine}: {now.stage}: {now.text}")
            return
        first.extend([] if first else [(time.monotonic(), now.answers)])
        (began, had), left = first[0], ""
        if had < now.answers < now.wanted:
            seconds = (time.monotonic() - began) / (now.answers - had) * (now.wanted - now.answers)
            left = f", about {seconds:.0f} s left"
        report(f"{engine}: {now.answers} of {now.wanted} answers{left}", passing=now.answers < now.wanted)

    return progress


def weights_progress(report: Callable[..., None]) -> Callable[[WeightsProgress], None]:
    """Reports how much of both checkpoints has been compared, and how fast."""
    started: list[float] = []

    def progress(now: WeightsProgress) -> None:
        started.extend([] if started else [time.monotonic()])
        speed = now.done / max(time.monotonic() - started[0], 0.1) / 2**20
        share, total = 100 * now.done / max(now.total, 1), now.total / 2**20
        text = f"weights: {share:.0f} % of {total:,.0f} MiB compared, {speed:,.0f} MiB/s"
        report(text, passing=now.done < now.total)

    return progress


@contextmanager
def progress_bar(task: str, steps: int) -> Iterator[Callable[[], None]]:
    """A bar that disappears when the work is done; nothing if standard error is not a terminal. What it yields is
    called after each step."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or detail() == "quiet":
        # rich would still print an empty line.
        yield lambda: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        number = bar.add_task(task, total=steps)
        yield lambda: bar.advance(number)
