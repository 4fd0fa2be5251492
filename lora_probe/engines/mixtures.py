"""Which modules of an adapter change one token: an engine with the weights of two runs, module by module.

In: a working folder with the request in `bisect.json`, and an engine with the method `mixture(spec, folder, writer)`,
which returns a `NextToken`. Out: in that folder, the result in `bisected.json` and the timeline in
`bisect/events.jsonl`. It runs in a separate process, which `bisecting.bisect` starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from lora_probe.engines import make
from lora_probe.errors import EngineFailed
from lora_probe.recording import SCHEMA, Process, RunSpec, TraceWriter, write_json

BISECT, BISECTED = "bisect.json", "bisected.json"

NextToken = Callable[[Sequence[str]], int]
"""The most likely next token if these modules run as in the candidate, and all others as in the reference."""


class Side(msgspec.Struct, frozen=True):
    """The weights of one run: the adapter in `folder`, of which the modules `off` run without an adapter, and those in
    `factors` at another scale. With `as_loaded` an engine that has slots takes what it holds after it has loaded the
    folder, right or wrong, instead of the values of the file."""

    folder: str
    off: list[str] = []
    factors: dict[str, float] = {}
    as_loaded: bool = False


class BisectSpec(msgspec.Struct, frozen=True):
    """What to run in `engine`: the base `model` in `dtype` after `ids`, with the weights of both sides. `changed` are
    the modules that differ. At most `runs` mixtures are tried. `run` is a run of the same engine, whose options this
    one uses, too."""

    engine: str
    model: str
    dtype: str
    reference: Side
    candidate: Side
    ids: list[int]
    changed: list[str]
    runs: int
    run: RunSpec | None = None


class Bisected(msgspec.Struct, frozen=True):
    """The most likely next token with all modules of the reference, and with all of the candidate; and the smallest set
    of modules that was found to change one into the other, which is one from which no module can be taken away if it is
    `minimal`."""

    reference: int
    candidate: int
    modules: list[str]
    runs: int
    minimal: bool


def bisect_in(folder: Path) -> None:
    """Run the request of a folder.

    Raises:
        EngineFailed: the engine cannot run with mixed weights, or with its own message.
    """
    spec = msgspec.json.decode((folder / BISECT).read_bytes(), type=BisectSpec)
    process = Process(SCHEMA, role="bisect", engine=spec.engine, rank=0, pid=os.getpid(), versions={})
    with TraceWriter(folder / "bisect", process) as writer:
        mixture = getattr(make(spec.engine), "mixture", None)
        if mixture is None:
            raise EngineFailed(f"the engine `{spec.engine}` cannot run with mixed weights: it has no `mixture`")
        next_token: NextToken = mixture(spec, folder, writer)
        write_json(folder / BISECTED, search(spec, next_token, writer))


def search(spec: BisectSpec, next_token: NextToken, writer: TraceWriter) -> Bisected:
    """The result of a bisection; its progress goes to the timeline."""
    before, after = next_token(()), next_token(spec.changed)
    if before == after:
        return Bisected(before, after, [], 2, False)

    def report(size: int, runs: int) -> None:
        writer.event("bisect", f"{runs} of at most {spec.runs} runs, {size} of {len(spec.changed)} modules left")

    changes = Limited(lambda chosen: next_token(chosen) == after, spec.runs - 2)
    modules, minimal = smallest(spec.changed, changes, report)
    return Bisected(before, after, modules, 2 + changes.runs, minimal)


class Limited:
    """A test of sets of modules that remembers its results, and gives up after `most` runs."""

    def __init__(self, test: Callable[[Sequence[str]], bool], most: int) -> None:
        self._test, self._most = test, most
        self._known: dict[frozenset[str], bool] = {}

    @property
    def runs(self) -> int:
        return len(self._known)

    @property
    def spent(self) -> bool:
        return self.runs >= self._most

    def __call__(self, chosen: Sequence[str]) -> bool:
        key = frozenset(chosen)
        if key not in self._known:
            if self.spent:
                return False
            self._known[key] = self._test(chosen)
        return self._known[key]


def smallest(
    every: Sequence[str], changes: Limited, report: Callable[[int, int], None] = lambda *_: None
) -> tuple[list[str], bool]:
    """The smallest part of `every` for which `changes` is true, and whether no element can be left out of it.

    Zeller and Hildebrandt, Simplifying and isolating failure-inducing input (2002): parts are tried first, then what
    is left without each part, with smaller parts when neither shows it.
    """
    current, count = list(every), 2
    while len(current) > 1 and not changes.spent:
        report(len(current), changes.runs)
        parts = _divided(current, count)
        rests = [[module for module in current if module not in part] for part in map(set, parts)]
        if (part := next((part for part in parts if changes(part)), None)) is not None:
            current, count = part, 2
        elif count > 2 and (rest := next((rest for rest in rests if changes(rest)), None)) is not None:
            current, count = rest, max(count - 1, 2)
        elif count >= len(current):
            return current, not changes.spent
        else:
            count = min(2 * count, len(current))
    return current, len(current) == 1


def _divided(modules: Sequence[str], count: int) -> list[list[str]]:
    bounds = [len(modules) * number // count for number in range(count + 1)]
    return [list(modules[begin:end]) for begin, end in pairwise(bounds)]
