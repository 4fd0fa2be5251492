"""Rounds in which two things take turns, and what is stored of them.

In: a function to measure and one to compare it with. Out: their results, round by round. The other one runs before and
after each run, so a machine that becomes slower or faster meanwhile changes both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from lora_probe.recording.benchmarks import Benchmarks, Measured, Measurement

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Rounds(Generic[T, R]):
    """`runs` has a result for each round; `others` has one more: before each run, and after the last."""

    runs: list[T]
    others: list[R]

    def ratios(self, of_run: Callable[[T], float], of_other: Callable[[R], float]) -> list[float]:
        """A value of each run, relative to the mean of the two runs of the other beside it."""
        beside = [of_other(other) for other in self.others]
        return [
            of_run(run) / ((before + after) / 2)
            for run, before, after in zip(self.runs, beside[:-1], beside[1:], strict=True)
        ]


Repeat = Callable[[Callable[[], None], Callable[[], None], int], object]
"""Calls a function some times, and another one before each call."""


def _plainly(target: Callable[[], None], before: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        before()
        target()


def timed_by(benchmark: Any) -> Repeat:
    """Calls that pytest-benchmark times."""
    return lambda target, before, rounds: benchmark.pedantic(target, setup=before, rounds=rounds, iterations=1)


def take_turns(run: Callable[[], T], other: Callable[[], R], rounds: int, repeat: Repeat = _plainly) -> Rounds[T, R]:
    """Run in turn with `other`. Both run once before, uncounted."""
    runs: list[T] = []
    others: list[R] = []
    other()
    run()
    repeat(lambda: runs.append(run()), lambda: others.append(other()), rounds)
    others.append(other())
    return Rounds(runs, others)


@dataclass
class Results:
    """What this run has measured, in order."""

    measurements: list[Measurement] = field(default_factory=list)

    def add(self, benchmark: Any, measured: Measured) -> None:
        """Store a measurement in the benchmark's `extra_info`, and for the tables at the end."""
        benchmark.extra_info.update(msgspec.to_builtins(measured))
        stats = benchmark.stats.stats
        self.measurements.append(Measurement(benchmark.name, stats.median, stats.rounds, measured))

    @property
    def benchmarks(self) -> Benchmarks:
        return Benchmarks(None, tuple(self.measurements))
