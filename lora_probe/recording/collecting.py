"""The recordings of several machines in one trace: each node of a distributed engine writes to its own disk.

In: the trace folders of the nodes, from untrusted sources. Out: a new trace folder with the processes of all of them.
They must be of the same start of one engine; what else they contain is not copied.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_probe.adapter.folder import inside, listed
from lora_probe.errors import ProbeError, UnreadableFile
from lora_probe.recording.documents import document
from lora_probe.recording.reader import Trace, open_trace
from lora_probe.recording.runs import LAUNCH, Launch

RUN = "run.json"


def collect(folders: Sequence[Path], out: Path) -> Trace:
    """Copy the newest run of each of `folders` into `out`, which must not exist.

    Raises:
        ProbeError: they are not of one start of an engine, two of them have the same process, or `out` exists.
        UnreadableFile: one of them is not a trace, or cannot be copied.
    """
    if os.path.lexists(out):
        raise ProbeError(f"`{out}` already exists", "use another name with -o, or delete it")
    traces = [open_trace(folder) for folder in folders]
    _require_one_start(traces)
    _require_different_processes(traces)
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
        partial.chmod(0o755)
        for source, name in _files(traces):
            target = partial / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        partial.rename(out)
    except OSError as error:
        raise UnreadableFile(f"cannot write `{out}`: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return open_trace(out)


def _require_one_start(traces: Sequence[Trace]) -> None:
    starts = {_start(trace): trace.path for trace in traces}
    if len(starts) > 1:
        first, second, *_ = starts.values()
        raise ProbeError(
            f"`{first}` and `{second}` are of different starts of an engine",
            "collect the folders that the nodes of one engine wrote at the same time; `compare` is for two traces",
        )


def _start(trace: Trace) -> str:
    """What all processes of one start have in common. Only one node has the run.json of a run of `trace`."""
    launches = {worker.process.launch for worker in trace.workers}
    if len(launches) == 1 and all(launches):
        return launches.pop()
    if trace.run is not None:
        return f"{trace.run.created} {trace.run.spec.engine}"
    path = trace.path / LAUNCH
    return document(inside(trace.path, LAUNCH), Launch).launch if os.path.lexists(path) else str(trace.path)


def _require_different_processes(traces: Sequence[Trace]) -> None:
    owners: dict[str, Path] = {}
    for trace in traces:
        for process in trace.processes:
            name = process.folder.name
            if (other := owners.setdefault(name, trace.path)) != trace.path:
                raise ProbeError(f"`{other}` and `{trace.path}` both have `{name}`", "pass each node's folder once")


def _files(traces: Sequence[Trace]) -> Iterator[tuple[Path, str]]:
    """Each file with its path in the new folder. Of links only those are followed that stay in their trace."""
    for name in (RUN, LAUNCH):
        having = [trace.path for trace in traces if os.path.lexists(trace.path / name)]
        if having:
            yield inside(having[0], name), name
    for trace in traces:
        for process in trace.processes:
            home = process.folder
            for entry in listed(home):
                path = inside(trace.path, f"{home.name}/{entry.name}")
                if path.is_file():
                    yield path, f"{home.name}/{entry.name}"
