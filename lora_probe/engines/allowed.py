"""What an engine's process may take: time and memory, of it and of all that it starts.

In: the number of the process, and how far it has got. Out: why it must be stopped, if it must. Memory is what the
processes really hold: engines reserve far more address space than they use.
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
    """`seconds` in all, `idle` seconds in which nothing is written, `memory` in bytes; None: as much as there is."""

    seconds: float | None = None
    idle: float | None = None
    memory: int | None = None


DESCRIBE = Allowed(seconds=300, memory=6 * GIB)
"""To describe a base without its weights. 80 layers take 10 to 30 s and less than 2 GiB on two processors."""
RUN = Allowed(idle=3600)
"""To run or merge a model. How long that takes is the user's affair, as long as something happens."""
SHARE = 0.9
"""Of the machine's memory, or the container's, before the kernel ends processes of its own choice."""
_PAUSE = 1.0
"""Seconds between two looks at the memory."""


class Watched:
    """A process and all of its session, from its start on."""

    def __init__(self, session: int, allowed: Allowed) -> None:
        self.session, self.allowed = session, allowed
        self.memory = min(allowed.memory or _machine(), int(SHARE * _machine()))
        self.started = self.moved = self.looked = time.monotonic()
        self.written = -1

    def exceeds(self, written: int) -> str:
        """Why the process must be stopped; empty where it may go on. `written`: the bytes it has written so far."""
        now = time.monotonic()
        if written != self.written:
            self.written, self.moved = written, now
        if self.allowed.seconds is not None and now - self.started > (most := limits.raised(self.allowed.seconds)):
            return f"the engine's process took more than {most:.0f} s"
        if self.allowed.idle is not None and now - self.moved > (most := limits.raised(self.allowed.idle)):
            return f"the engine's process has done nothing for {most:.0f} s"
        if now - self.looked > _PAUSE:
            self.looked = now
            if (held := _held(self.session)) > self.memory:
                return f"the engine's process took {held / GIB:.1f} of {self.memory / GIB:.1f} GiB of memory"
        return ""


def _held(session: int) -> int:
    """Bytes of memory that the processes of a session hold by themselves; files that they map do not count."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in parentheses, may hold anything; behind it: state, parent, group, session.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += sum(
                    int(line.split()[1]) * 1024
                    for line in (folder / "status").read_text().splitlines()
                    if line.startswith("RssAnon:")
                )
        except (OSError, ValueError, IndexError):
            # It has ended since the folder was listed.
            continue
    return total


def _machine() -> int:
    """Bytes of memory of this machine, or of the container that this process runs in."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return whole
