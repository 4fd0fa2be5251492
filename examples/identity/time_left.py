"""The remaining time of the training, estimated from its own steps.

In: the steps and losses of transformers' Trainer. Out: a printed line after the first steps and with every loss.
Unlike a progress bar, whole lines look the same in a terminal and in a log file.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from transformers import TrainerCallback

FIRST = 3
"""The step after which the time left is first printed. The first step allocates memory and is slower, so it is not
measured."""
WINDOW = 10
"""Only the last steps are measured, as the load of the machine may change."""


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
    """The approximate time left, as the end of a line; empty if none is left."""
    if seconds <= 0:
        return ""
    if seconds < 90:
        return f", about {max(10 * round(seconds / 10), 10)} seconds left"
    return f", about {round(seconds / 60)} minutes left"
