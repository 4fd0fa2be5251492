"""Whether the process that wrote a recording still runs.

In: a process id with the time at which its process began, as recorded by that process. Out: whether this machine runs
that very process now; a later process with the same id began at another time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_PROC = Path("/proc")


def host() -> str:
    """This start of this machine, and the namespace that process ids belong to; "" if the system reports neither."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def began(pid: int) -> str:
    """When a process began, in clock ticks since the machine started; "" if it does not run."""
    try:
        # The name of the program is in parentheses, and may contain anything.
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
        state, ticks = fields[0], fields[19]
    except (OSError, IndexError):
        return ""
    return "" if state in (b"Z", b"X") else ticks.decode("ascii", "replace")


def is_running(pid: int, on_host: str, since: str) -> bool:
    """Whether process `pid` of `on_host`, which began at `since`, runs now. A process of another host counts as ended,
    as nothing is known about it."""
    return bool(on_host and since) and on_host == host() and began(pid) == since


def this_process() -> dict[str, Any]:
    """The fields of process.json that `is_running` needs."""
    return {"pid": os.getpid(), "host": host(), "began": began(os.getpid())}
