"""A saved benchmark: a file of `pytest benchmarks/ --benchmark-json BENCH.json`.

In: the file, of our own benchmarks or any of pytest-benchmark. Out: `Benchmarks`: what was measured, and its ratios to
what was measured beside it in the same rounds. Only ratios can be compared between machines.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from lora_probe.errors import UnreadableFile
from lora_probe.recording.documents import document

Of = Literal["speed", "prefill", "decode", "time", "peer"]
"""What a ratio is of: tokens per second of all, before and after the first token; seconds of a process to those of its
limit; seconds of a peer to ours."""
THROUGHPUT = "throughput"
"""The group of measurements with speeds for prefill and decode; others are seconds of whole processes."""
WITH_ADAPTER, MERGED = "with the adapter", "merged model"
"""Two modes of it: relative to vLLM without LoRA, and to the first."""
MOST_ROUNDS = 1000
"""Rounds of one ratio that are read."""
CONFIDENCE = 0.05
"""How often the median of many more rounds would be outside of `Ratio.low` to `Ratio.high`, at most if there are six
rounds or more."""


class Ratio(msgspec.Struct, frozen=True):
    """How something compares with `to`: a value for each round, in which the two took turns. `least` and `most` are the
    target for the median."""

    to: str
    values: list[float]
    of: Of = "speed"
    least: float | None = None
    most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return sorted(self.values)[_left_out(len(self.values))]

    @property
    def high(self) -> float:
        return sorted(self.values)[-1 - _left_out(len(self.values))]

    @property
    def noise(self) -> bool:
        """Whether the rounds do not show a difference: 1 is inside the spread of the median."""
        return self.low <= 1 <= self.high

    @property
    def met(self) -> bool:
        """Whether the median is on the right side of the target."""
        return not (
            (self.least is not None and self.median < self.least) or (self.most is not None and self.median > self.most)
        )

    @property
    def missed(self) -> bool:
        """Whether the whole spread is on the wrong side of the target. If only the median is, it cannot be told."""
        return (self.least is not None and self.high < self.least) or (self.most is not None and self.low > self.most)


@cache
def _left_out(rounds: int) -> int:
    """How many of the sorted values can be left out on each side, so that the rest still contains the true median with
    the confidence above: the sign test."""
    chance = 0.0
    for out in range((rounds + 1) // 2):
        chance += math.comb(rounds, out) / 2**rounds
        if 2 * chance > CONFIDENCE:
            return max(0, out - 1)
    return 0


class Measured(msgspec.Struct, frozen=True):
    """`extra_info` of one of our benchmarks. `mode` is what was measured, `group` the table it belongs to; `rates` are
    medians over the rounds; `peak_mib` is the largest memory of its process."""

    mode: str = ""
    group: str = ""
    model: str = ""
    adapter: str = ""
    rank: int = 0
    batch: int = 0
    dtype: str = ""
    versions: dict[str, str] = {}
    rates: dict[str, float] = {}
    ratios: list[Ratio] = []
    peak_mib: float | None = None

    def ratio(self, of: Of) -> Ratio | None:
        return next((ratio for ratio in self.ratios if ratio.of == of), None)


class _Stats(msgspec.Struct, frozen=True):
    median: float
    rounds: int = 0


class _Machine(msgspec.Struct, frozen=True):
    cpu: dict[str, Any] = {}
    machine: str = ""
    python_version: str = ""


class _Benchmark(msgspec.Struct, frozen=True):
    name: str
    stats: _Stats
    extra_info: dict[str, Any] = {}


class _File(msgspec.Struct, frozen=True):
    """What pytest-benchmark writes, as far as it is needed here."""

    benchmarks: list[_Benchmark]
    machine_info: _Machine = _Machine()
    datetime: str = ""


@dataclass(frozen=True)
class Measurement:
    """One benchmark: its median seconds, and what it says of itself."""

    name: str
    seconds: float
    rounds: int
    measured: Measured

    @property
    def title(self) -> str:
        return self.measured.mode or self.name


@dataclass(frozen=True)
class Benchmarks:
    """All measurements of a file, in its order. `path` is None for those of a run that has just ended."""

    path: Path | None
    measurements: tuple[Measurement, ...]
    created: str = ""
    machine: str = ""

    @property
    def groups(self) -> dict[str, list[Measurement]]:
        """By table."""
        groups: dict[str, list[Measurement]] = {}
        for measurement in self.measurements:
            groups.setdefault(measurement.measured.group, []).append(measurement)
        return groups

    @property
    def targets(self) -> list[tuple[Measurement, Ratio]]:
        """The ratios that have a target."""
        ratios = [(measurement, ratio) for measurement in self.measurements for ratio in measurement.measured.ratios]
        return [(of, ratio) for of, ratio in ratios if (ratio.least, ratio.most) != (None, None)]


def open_benchmarks(path: Path | str) -> Benchmarks:
    """Read a saved benchmark.

    Raises:
        UnreadableFile: it is no file of pytest-benchmark.
    """
    path = Path(path)
    try:
        saved = document(path, _File)
    except UnreadableFile as error:
        raise UnreadableFile(
            error.message, "pass a file of `pytest benchmarks/ --benchmark-json BENCH.json`, or the folder of a trace"
        ) from error
    if not saved.benchmarks:
        raise UnreadableFile(f"`{path}` contains no benchmark", "see whether pytest deselected all of them")
    measurements = tuple(_measurement(path, benchmark) for benchmark in saved.benchmarks)
    return Benchmarks(path, measurements, saved.datetime, _machine(saved.machine_info))


def _measurement(path: Path, benchmark: _Benchmark) -> Measurement:
    try:
        measured = msgspec.convert(benchmark.extra_info, Measured)
    except msgspec.ValidationError as error:
        raise UnreadableFile(
            f"cannot read `{path}`: `extra_info` of `{benchmark.name}`: {error}",
            "pass a file of lora-probe's own benchmarks; others may use the same names for other things",
        ) from error
    measured = msgspec.structs.replace(measured, ratios=[ratio for ratio in measured.ratios if ratio.values])
    if any(len(ratio.values) > MOST_ROUNDS for ratio in measured.ratios):
        raise UnreadableFile(f"cannot read `{path}`: `{benchmark.name}` has more than {MOST_ROUNDS} rounds")
    numbers = [benchmark.stats.median, *measured.rates.values()]
    numbers += [value for ratio in measured.ratios for value in ratio.values]
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise UnreadableFile(f"cannot read `{path}`: `{benchmark.name}` has a figure that is negative or not finite")
    return Measurement(benchmark.name, benchmark.stats.median, benchmark.stats.rounds, measured)


def _machine(info: _Machine) -> str:
    brand, count = info.cpu.get("brand_raw"), info.cpu.get("count")
    cores = f"{count} cores" if isinstance(count, int) else ""
    parts = [brand if isinstance(brand, str) else info.machine, cores]
    return ", ".join(part for part in (*parts, info.python_version and f"Python {info.python_version}") if part)


def middle(rates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each rate over the rounds."""
    return {name: statistics.median(of[name] for of in rates) for name in rates[0]}
