"""Whole processes: their seconds, their peak memory, and what they print.

In: a command. Out: a `Ran`. A benchmark of a process is a ratio to a limit, another process that does the least that
could be enough (`limits.py`), in turn with it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rounds import Results, Rounds, take_turns, timed_by

from lora_probe.recording.benchmarks import Measured, Ratio

PROBE = str(Path(sys.executable).with_name("lora-probe"))
MEASURE = """
import os, sys, time
started = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - started, usage.ru_maxrss / 1024, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small parent process: a child's peak includes the memory of its parent when it was spawned. Of several processes of
a command, the peak is that of the largest."""


@dataclass(frozen=True)
class Ran:
    """A process that has ended: its wall time, its largest memory, its standard output."""

    seconds: float
    peak_mib: float
    printed: str


def run(*command: str | Path, status: int = 0) -> Ran:
    """Run a command.

    Raises:
        AssertionError: it ended with another status.
    """
    words = [sys.executable, "-c", MEASURE, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == status, f"{command} ended with {done.returncode}: {done.stderr[-2000:]}"
    seconds, peak = map(float, done.stderr.splitlines()[-1].split())
    return Ran(seconds, peak, done.stdout)


@dataclass(frozen=True)
class Limit:
    """What a process is compared with: its name, and its command."""

    name: str
    command: tuple[str | Path, ...]


@dataclass(frozen=True)
class Peer:
    """What a user would take instead."""

    name: str
    command: tuple[str | Path, ...]
    status: int = 0


def reading(what: str, name: str, *paths: Path) -> Limit:
    """To read all files below some folders once."""
    files = [path for folder in paths for path in sorted(folder.rglob("*")) if path.is_file()]
    return Limit(name, (sys.executable, Path(__file__).parent / "limits.py", what, *files))


def peer(environment: Path | None, program: str, *words: str | Path, status: int = 0) -> list[Peer]:
    """A program of the Python environment of `--peers`; none without that option."""
    if environment is None:
        return []
    path = environment / "bin" / program
    assert path.exists(), f"--peers {environment} has no {program}"
    return [Peer(program, (path, *words), status)]


@dataclass
class Stopwatch:
    """Measures commands for one benchmark, and stores what it has measured."""

    benchmark: Any
    results: Results
    rounds: int
    versions: dict[str, str]

    def against(
        self,
        mode: str,
        command: Sequence[str | Path],
        limit: Limit,
        check: Callable[[str], object],
        *,
        most: float | None = None,
        status: int = 0,
        peers: Sequence[Peer] = (),
        least_of_peer: float | None = None,
    ) -> None:
        """Time `command` in turn with its limit. `check` receives what it printed and fails if that is not the right
        answer; `most` is the target. Each peer runs once, beside one more run of the command."""
        rounds: Rounds[Ran, Ran] = take_turns(
            lambda: run(*command, status=status),
            lambda: run(*limit.command),
            self.rounds,
            timed_by(self.benchmark),
        )
        for ran in rounds.runs:
            check(ran.printed)
        seconds = rounds.ratios(lambda ran: ran.seconds, lambda ran: ran.seconds)
        ratios = [Ratio(limit.name, seconds, "time", most=most)]
        for peer in peers:
            turns = [(run(*peer.command, status=peer.status), run(*command, status=status)) for _ in range(3)]
            longer = [theirs.seconds / ours.seconds for theirs, ours in turns]
            ratios.append(Ratio(peer.name, longer, "peer", least=least_of_peer))
        store(self.benchmark, self.results, mode, rounds.runs, ratios, self.versions)


def store(
    benchmark: Any,
    results: Results,
    mode: str,
    runs: Sequence[Ran],
    ratios: Sequence[Ratio],
    versions: dict[str, str],
) -> None:
    """Add a measurement to the hot paths."""
    peaks = [ran.peak_mib for ran in runs if ran.peak_mib]
    measured = Measured(
        mode=mode,
        group="hot paths",
        versions=versions,
        rates={"seconds": statistics.median(ran.seconds for ran in runs)},
        ratios=list(ratios),
        peak_mib=max(peaks, default=None),
    )
    results.add(benchmark, measured)


def of_json(printed: str) -> Any:
    """What a command with `--format json` printed."""
    return json.loads(printed)
