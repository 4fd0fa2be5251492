"""The folder that a run is recorded in, and how a second run is kept from writing to it at the same time.

In: the name that was requested. Out: a new folder, or an error that names what is in the way. A run locks its log. The
engine's processes inherit the open file, so the lock lasts as long as one of them, or the process that waits for them.
"""

from __future__ import annotations

import fcntl
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from lora_probe.errors import ProbeError
from lora_probe.recording import Process

LOG = "engine.log"
ERROR = "error.json"
BEFORE = ".before"
"""Suffix of a trace that --force overwrites, until the new one is recorded."""


def lock(file: IO[Any]) -> None:
    """Lock a file until it is closed everywhere. On a file system without locks, nothing is locked."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Whether a running process has locked a file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def folder_for(name: str, engine: str, out: str | Path | None, force: bool) -> Path:
    """A new folder: `out`, or the first free name. With `force`, a trace in `out` is moved away.

    Raises:
        ProbeError: `out` is in use, exists without `force`, or is something else than a trace.
    """
    if out is not None:
        folder = Path(out)
        if _failed(folder):
            # A run that failed before it recorded anything: nothing is lost.
            shutil.rmtree(folder)
        elif folder.exists():
            _move_away(folder, force)
    else:
        stem, number = f"{name}-{engine}", 1
        folder = Path(f"{stem}.lptrace")
        while folder.exists():
            number += 1
            folder = Path(f"{stem}-{number}.lptrace")
    return make_folder(folder)


def make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ProbeError(f"cannot create the folder `{folder}`: {error.strerror or error}") from error
    return folder


def _move_away(folder: Path, force: bool) -> None:
    if is_locked(folder / LOG):
        raise ProbeError(
            f"`{folder}` is being recorded by another process", "wait until it ends, or pass another name with -o"
        )
    is_trace = (folder / "run.json").exists()
    if not force:
        state = "contains an incomplete recording" if is_trace and not _complete(folder) else "already exists"
        raise ProbeError(f"`{folder}` {state}", "pass another name with -o, or overwrite it with --force")
    if not is_trace:
        raise ProbeError(f"`{folder}` is not a trace and is not overwritten", "pass another name with -o")
    before = folder.with_name(folder.name + BEFORE)
    if before.exists():
        # The last run with --force was interrupted: what it should have replaced is worth more than what it left.
        shutil.rmtree(folder)
    else:
        # Kept until the new one is recorded.
        folder.rename(before)


def _failed(folder: Path) -> bool:
    """Whether a folder holds a run that failed, and nothing else."""
    if not (folder / ERROR).is_file() or not (folder / "run.json").is_file():
        return False
    others = [entry for entry in folder.iterdir() if entry.name not in (ERROR, LOG, "run.json")]
    return all((entry / "process.json").is_file() for entry in others)


def _complete(folder: Path) -> bool:
    """Whether all processes of a run closed their recording."""
    try:
        states = [msgspec.json.decode(path.read_bytes(), type=Process) for path in folder.glob("*/process.json")]
    except (OSError, msgspec.MsgspecError):
        return False
    return bool(states) and all(state.closed for state in states)
