"""How long the training still takes, measured on its own steps.

In: the steps and losses of transformers' Trainer. Out: a printed line after the first steps and with every loss.
Whole lines read the same in a terminal and in a log file; a progress bar does not.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from transformers import TrainerCallback

FIRST = 3
"""The step after which the time left is printed first. The first step is slower, as memory is allocated in it: it is
not measured."""
WINDOW = 10
"""The last steps alone are measured: what else the machine does may have changed."""


class TimeLeft(TrainerCallback):
    """Prints the time left; to be passed to a Trainer that prints nothing itself."""

    def __init__(self) -> None:
        self.ends: deque[float] = deque(maxlen=WINDOW + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.monotonic())
        if state.global_step == FIRST:
            self.print_line(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.print_line(state, f", loss {float(logs['loss']):.3f}")

    def print_line(self, state: Any, loss: str = "") -> None:
        seconds = (self.ends[-1] - self.ends[0]) / max(len(self.ends) - 1, 1)
        left = (state.max_steps - state.global_step) * seconds
        print(f"  step {state.global_step} of {state.max_steps}{loss}{duration_left(left)}", flush=True)


def duration_left(seconds: float) -> str:
    """About how long, as the end of a line; empty at the end."""
    if seconds <= 0:
        return ""
    if seconds < 90:
        return f", about {max(10 * round(seconds / 10), 10)} seconds left"
    return f", about {round(seconds / 60)} minutes left"
