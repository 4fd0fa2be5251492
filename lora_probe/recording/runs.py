"""The runs inside one trace folder: each start of an engine that records into the same folder is a run of its own.

In: the folder that a user names. Out: for a process that begins to write, the folder of its run; for a reader, the
folders of all runs. The first run is in the folder itself, the later ones in `run-2`, `run-3` and so on. All processes
of an engine pass the same launch id, and `launch.json` in a run's folder contains it: the first process creates the
file, with its content in one step, and the others find their own id there. So they agree without talking to each other.
"""

from __future__ import annotations

import datetime
import os
import re
from contextlib import suppress
from pathlib import Path

import msgspec

from lora_probe.adapter.folder import listed
from lora_probe.errors import UnreadableFile
from lora_probe.files import shown

LAUNCH = "launch.json"
_LATER = re.compile(r"run-([1-9][0-9]{0,8})")


class Launch(msgspec.Struct, frozen=True):
    """launch.json: what began a run."""

    launch: str
    created: str


def begin_run(folder: Path, name: str, launch: str) -> Path:
    """The folder in which a process begins to write its own folder `name` for `launch`. It is created.

    Raises:
        OSError: it cannot be created, or `folder` is not one.
    """
    number = 1
    while True:
        run = folder if number == 1 else folder / f"run-{number}"
        run.mkdir(parents=True, exist_ok=True)
        if _is_ours(run, launch) and not (run / name).exists():
            return run
        number += 1


def _is_ours(run: Path, launch: str) -> bool:
    """Whether a run belongs to a launch, which it does from now on if it belonged to none."""
    if (run / "run.json").exists():
        # Whoever wrote it has started this engine, for this run.
        return True
    marker = run / LAUNCH
    # Looked for first: whoever writes a marker does so before its process.json.
    recorded = any(run.glob("*/process.json"))
    if not marker.exists():
        if recorded:
            # By an older version, which wrote no marker.
            return False
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        _create(marker, msgspec.json.encode(Launch(launch, created)))
    try:
        return msgspec.json.decode(marker.read_bytes(), type=Launch).launch == launch
    except msgspec.DecodeError:
        return False


def _create(path: Path, content: bytes) -> None:
    """Create a file with its content in one step, unless it exists: then another process was first."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:
        # A file system without links. Two processes that begin in the same moment may then write two runs.
        with suppress(FileExistsError), path.open("xb") as file:
            file.write(content)
    finally:
        partial.unlink()


def later_runs(folder: Path) -> list[Path]:
    """The folders of the later runs of a trace, in order. A symbolic link is an error, as it may lead anywhere."""
    runs = {}
    for entry in listed(folder):
        if (match := _LATER.fullmatch(entry.name)) is None or not entry.is_dir():
            continue
        if entry.is_symlink():
            raise UnreadableFile(
                f"`{shown(str(entry), 300)}` is a symbolic link, not the folder of a run",
                "copy the folder into the trace if you trust it",
            )
        runs[int(match[1])] = entry
    return [runs[number] for number in sorted(runs)]


def inside_of(path: Path) -> Path | None:
    """The trace folder that `path` names one run of: `TRACE/run-2`, or `TRACE/run-1` for the first one, which is in the
    trace's own folder. None for another folder, whatever its name."""
    match = _LATER.fullmatch(path.name)
    if match is None or not _is_trace(path.parent):
        return None
    return path.parent if path.name == "run-1" or os.path.lexists(path / LAUNCH) else None


def _is_trace(folder: Path) -> bool:
    names = ("run.json", LAUNCH)
    return any(os.path.lexists(folder / name) for name in names) or any(folder.glob("*/process.json"))
