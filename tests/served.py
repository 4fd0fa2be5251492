"""The trace of a server, as the plugin writes it: several adapters and the base model in the same steps.

In: loads and requests. Out: a trace in a folder, closed, or still running in this process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_probe.ledger import OK, STATIONS, Finding
from lora_probe.names import Key
from lora_probe.recording import DECODE, PREFILL, SCHEMA, Load, ModuleRecord, Placed, Process, Rows, TraceWriter

Q, K = (tuple((f"model.layers.{n}.self_attn.{p}_proj", "weight", None) for n in range(2)) for p in "qk")
COLUMNS: tuple[Key, ...] = (Q[0], K[0], Q[1], K[1])
"""A step records the modules of all adapters."""
BASE = 2.0
"""The norm of every base output."""


@dataclass(frozen=True)
class Served:
    """One load: the modules that it has, its contribution relative to the base output, and a fault at one module."""

    number: int
    name: str
    modules: tuple[Key, ...] = COLUMNS
    strength: float = 0.5
    fault: Finding | None = None
    at: Key = Q[1]

    @property
    def load(self) -> Load:
        digest = f"{self.name * 32}"[:32] + f"{self.number:032x}"
        return Load(self.number, self.name, f"/adapters/{self.name}", digest, 1 + ord(self.name[0]), self.number, 0)


A = Served(0, "A", strength=0.7)
B = Served(1, "B", modules=Q, strength=0.2)
NONE = Served(-1, "", modules=(), strength=0.0)


def server(folder: Path, **changes: object) -> TraceWriter:
    """The writer of a server that runs in this process."""
    settings = {"model": "/models/base", "enable_prefix_caching": True, "enforce_eager": True, "model_runner": "V1"}
    process = Process(
        SCHEMA, "worker", "vllm", 0, os.getpid(), {"vllm": "0.32.0"}, "norms", dtype="float32", settings=settings
    )
    writer = TraceWriter(folder / "vllm-rank-0", process)
    if changes:
        writer.describe(**changes)
    return writer


def loaded(writer: TraceWriter, served: Served, stations: Sequence[str] = ("stored", "read", "placed")) -> None:
    """An adapter was loaded, and judged at some stations."""
    writer.record(served.load)
    for key in served.modules:
        writer.record(ModuleRecord(served.number, *key, ["file"]))
    judge(writer, served, stations)
    writer.event("read", f"{served.name} from {served.load.path}")


def judge(writer: TraceWriter, served: Served, stations: Sequence[str]) -> None:
    for station in STATIONS:
        if station in stations:
            healthy = [key for key in served.modules if served.fault is None or key != served.at]
            writer.station(served.number, station, OK, healthy)
            if served.fault is not None:
                writer.station(served.number, station, served.fault, [served.at])


def step(*parts: tuple[str, Served, range, int]) -> Rows:
    """One step: for each request its load, its positions in this step, and the length of its prompt."""
    requests, of, positions, phases = [], [], [], []
    for number, (_, served, places, prompt) in enumerate(parts):
        requests += [number] * len(places)
        of += [served] * len(places)
        positions += list(places)
        phases += [DECODE if place >= prompt else PREFILL for place in places]
    strengths = [[served.strength * (key in served.modules) for key in COLUMNS] for served in of]
    shape = (len(of), len(COLUMNS))
    delta = BASE * np.array(strengths, np.float32).reshape(shape)
    digests = {s.number: tuple("x" if key in s.modules else "" for key in COLUMNS) for s in of if s.number >= 0}
    return Rows(
        modules=COLUMNS,
        requests=tuple(name for name, *_ in parts),
        request=np.array(requests, np.int32),
        position=np.array(positions, np.int32),
        phase=np.array(phases, np.int8),
        load=np.array([served.number for served in of], np.int32),
        x_norm=np.ones(shape, np.float32),
        base_norm=np.full(shape, BASE, np.float32),
        delta_norm=delta,
        output_norm=np.full(shape, BASE, np.float32),
        placed={number: Placed(values) for number, values in digests.items()},
    )


def mixed(folder: Path, *loads: Served) -> Path:
    """A closed trace of some adapters and the base model in one batch: 4 tokens of a prompt, and one decode step."""
    with server(folder) as writer:
        for served in loads:
            loaded(writer, served)
        several = [*loads, NONE]
        for places in (range(4), range(4, 5)):
            writer.rows(step(*((f"request-{served.number}", served, places, 4) for served in several)))
        for served in loads:
            judge(writer, served, ("applied", "agrees"))
    return folder
