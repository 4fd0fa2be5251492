"""The child process of a run, a merge or a description: how it is started, watched and stopped, and what it runs.

In: a folder with the request (`run.json`, `merge.json` or `describe.json`). Out: the results in that folder, or the
child's message as an error. The child and all processes that it started end with the parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora_probe.adapter import TrainedAs
from lora_probe.base import open_base
from lora_probe.engines import make
from lora_probe.engines.allowed import Allowed, Watched
from lora_probe.engines.folder import ERROR, LOG, lock
from lora_probe.engines.mixtures import BISECT, bisect_in
from lora_probe.engines.peft.merge import MERGE, merge_into
from lora_probe.errors import EngineFailed, EngineStopped, ProbeError
from lora_probe.files.isolation import empty_folder, environment, python
from lora_probe.recording import Run, write_json

DESCRIBE, VIEW = "describe.json", "view.json"
"""The request to describe a base model, and the answer."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0


class Failure(msgspec.Struct, frozen=True):
    """error.json: why the child process failed."""

    message: str
    hint: str = ""


class DescribeSpec(msgspec.Struct, frozen=True):
    """describe.json."""

    engine: str
    model: str
    trained: TrainedAs


@dataclass(frozen=True)
class Progress:
    """How far a run is: the last line of the load timeline, and the answers and scored passes so far."""

    stage: str
    text: str
    answers: int
    wanted: int


def run_child(folder: Path, wanted: int, progress: Callable[[Progress], None], allowed: Allowed) -> None:
    """Start the child on `folder` and wait until it ends; `wanted` answers and scored passes are expected.

    The child works in an empty folder and imports nothing from the current one.

    Raises:
        EngineFailed: the child failed or died.
        EngineStopped: it used more time or memory than `allowed`.
        KeyboardInterrupt: after the child and its children have been stopped.
    """
    with empty_folder() as empty, (folder / LOG).open("ab") as log:
        lock(log)
        child = subprocess.Popen(
            python("-m", "lora_probe.engines", str(folder.absolute())),
            cwd=empty,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        watched = Watched(child.pid, allowed)
        try:
            while child.poll() is None:
                progress(_progress(folder, wanted))
                if why := watched.exceeds(_written(folder)):
                    raise EngineStopped(f"{why} while {_last_stage(folder)}", f"log: {folder / LOG}")
                time.sleep(POLL_SECONDS)
            progress(_progress(folder, wanted))
        finally:
            _end(child)
    if (folder / ERROR).exists():
        failure = msgspec.json.decode((folder / ERROR).read_bytes(), type=Failure)
        raise EngineFailed(failure.message, "\n".join(filter(None, [failure.hint, f"log: {folder / LOG}"])))
    if child.returncode != 0:
        recorded = (
            f"\nshow what was recorded until then: lora-probe show {folder}" if not (folder / MERGE).exists() else ""
        )
        raise EngineFailed(
            f"the engine's process ended with {_status(child.returncode)} while {_last_stage(folder)}",
            f"log: {folder / LOG}{recorded}",
        )


def child_environment() -> dict[str, str]:
    """The environment of the child and its workers.

    OpenMP's threads sleep while they wait for each other, unless the user has set the variable. (GOMP_SPINCOUNT takes
    precedence over it.) Measured on 2 cores with SmolLM2-135M: with one busy neighbour a token takes 70 ms instead of
    220 to 480 ms, and on an idle machine 70 ms instead of 41 ms.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE"} | environment()


def _written(folder: Path) -> int:
    """Bytes of the log and of all other files of the child: they grow while it makes progress."""
    files = [path for path in (*folder.glob("*"), *folder.glob("*/*")) if path.is_file()]
    return sum(path.stat().st_size for path in files if path.exists())


def _end(child: subprocess.Popen[bytes]) -> None:
    """Stop the child and everything in its session: with SIGTERM, then with SIGKILL."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    if child.stdin is not None:
        child.stdin.close()


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _progress(folder: Path, wanted: int) -> Progress:
    last, answers = ("start", "starting the process"), 0
    for path in folder.glob("*/events.jsonl"):
        for line in reversed(path.read_bytes().split(b"\n")):
            if b'"kind":"event"' in line:
                event = msgspec.json.decode(line) if line.endswith(b"}") else {}
                last = event.get("stage", last[0]), event.get("text", last[1])
                break
    for path in folder.glob("*/requests.jsonl"):
        answers += path.read_bytes().count(b"\n")
    answers += len(list(folder.glob("*/next-*.safetensors")))
    return Progress(*last, answers, wanted)


def _last_stage(folder: Path) -> str:
    progress = _progress(folder, 0)
    if progress.answers:
        return f"it was generating ({progress.answers} answers so far)"
    return f"it was in stage `{progress.stage}`: {progress.text}"


def run_in_child(folder: Path) -> int:
    """The child process: the merge, bisection, description or run that `folder` requests; it writes error.json if that
    fails."""
    _die_with_parent()
    try:
        if (folder / MERGE).exists():
            merge_into(folder)
        elif (folder / BISECT).exists():
            bisect_in(folder)
        elif (folder / DESCRIBE).exists():
            _describe_into(folder)
        else:
            spec = msgspec.json.decode((folder / "run.json").read_bytes(), type=Run).spec
            make(spec.engine).record(spec, folder)
    except ProbeError as error:
        write_json(folder / ERROR, Failure(error.message, error.hint))
        return error.exit_code
    return 0


def _describe_into(folder: Path) -> None:
    """Run `Engine.describe` with local files only: no download of an engine changes the name of a module."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = msgspec.json.decode((folder / DESCRIBE).read_bytes(), type=DescribeSpec)
    engine = make(spec.engine)
    if not hasattr(engine, "describe"):
        raise EngineFailed(f"the engine `{spec.engine}` cannot describe a base model: it has no `describe`")
    write_json(folder / VIEW, engine.describe(open_base(spec.model), spec.trained))


def _die_with_parent() -> None:
    """Kill this process's session when standard input closes: the parent holds its other end."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="lora-probe-parent").start()
