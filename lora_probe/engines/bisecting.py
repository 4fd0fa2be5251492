"""Starting a bisection in a process of its own. In: a `BisectSpec`. Out: what the engine found."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from lora_probe.engines import require
from lora_probe.engines.allowed import RUN
from lora_probe.engines.child import Progress, run_child
from lora_probe.engines.mixtures import BISECT, BISECTED, Bisected, BisectSpec
from lora_probe.files import limits
from lora_probe.recording import write_json


def bisect(spec: BisectSpec, progress: Callable[[Progress], None]) -> Bisected:
    """Run it; the working folder is removed afterwards.

    Raises:
        EngineFailed: the engine is not installed, or cannot load one of the adapters; with its message.
    """
    require(spec.engine)
    with tempfile.TemporaryDirectory(prefix="lora-probe-") as name, limits.waiting():
        folder = Path(name)
        write_json(folder / BISECT, spec)
        run_child(folder, 1, progress, RUN)
        return msgspec.json.decode((folder / BISECTED).read_bytes(), type=Bisected)
