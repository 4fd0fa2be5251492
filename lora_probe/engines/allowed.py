"""Limits of an engine's process: the time and memory that it and its child processes may use.

In: the process id, and how much it has written. Out: why it must be stopped, if it must. Memory counts only what the
processes really use: engines reserve far more address space.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lora_probe.files import limits

GIB = 2**30


@dataclass(frozen=True)
class Allowed:
    """`seconds` in total, `idle` seconds without any output, `memory` in bytes; None: no limit of its own."""

    seconds: float | None = None
    idle: float | None = None
    memory: int | None = None


DESCRIBE = Allowed(seconds=300, memory=6 * GIB)
"""For describing a base model without its weights: 80 layers take 10 to 30 s and less than 2 GiB on two processors."""
RUN = Allowed(idle=3600)
"""For running or merging a model, which may take any time as long as there is progress."""
SHARE = 0.9
"""Share of the machine's or container's memory: above it the kernel may kill any process."""
_PAUSE = 1.0
"""Seconds between two checks of the memory."""


class Watched:
    """A process and its whole session, from its start."""

    def __init__(self, session: int, allowed: Allowed) -> None:
        self.session, self.allowed = session, allowed
        self.memory = min(allowed.memory or _machine(), int(SHARE * _machine()))
        self.started = self.moved = self.looked = time.monotonic()
        self.written = -1

    def exceeds(self, written: int) -> str:
        """Why the process must be stopped; empty if it may continue. `written`: the bytes written so far."""
        now = time.monotonic()
        if written != self.written:
            self.written, self.moved = written, now
        if self.allowed.seconds is not None and now - self.started > (most := limits.raised(self.allowed.seconds)):
            return f"the engine's process took more than {most:.0f} s"
        if self.allowed.idle is not None and now - self.moved > (most := limits.raised(self.allowed.idle)):
            return f"the engine's process made no progress for {most:.0f} s"
        if now - self.looked > _PAUSE:
            self.looked = now
            if (held := _held(self.session)) > self.memory:
                return f"the engine's process used {held / GIB:.1f} of {self.memory / GIB:.1f} GiB of memory"
        return ""


def _held(session: int) -> int:
    """Bytes of private memory of the processes of a session; mapped files do not count."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in parentheses, may contain anything; after it: state, parent, group, session.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += sum(
                    int(line.split()[1]) * 1024
                    for line in (folder / "status").read_text().splitlines()
                    if line.startswith("RssAnon:")
                )
        except (OSError, ValueError, IndexError):
            # The process has ended since the folder was listed.
            continue
    return total


def _machine() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return whole
