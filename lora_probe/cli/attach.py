"""`lora-probe attach`: another level of detail for a running recording.

In: options. Out: the answer of every worker, or why there is none, and the exit status. The request and the answers are
files in the trace, so the server is neither restarted nor asked over the network.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN, FOUND
from lora_probe.cli.options import Command, add_limits, apply_limits
from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.render.formats import present
from lora_probe.render.results import Attachment, Worker

if TYPE_CHECKING:
    from lora_probe.recording import Process
    from lora_probe.recording.process_trace import ProcessTrace

PATIENCE, PAUSE = 10.0, 0.1
"""Seconds to wait for the answers, and between two looks. Workers read requests about once a second."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="RUN.lptrace", help="folder that a running engine records into")
    parser.add_argument(
        "--keep",
        choices=("events", "norms", "shrink", "tensors"),
        required=True,
        help="how much of each row is recorded from the next step on; events: no rows, and no cost per step",
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.recording import open_trace

    apply_limits(options)
    limits.begin(Path(options.trace))
    attachment = attach(open_trace(options.trace).workers, Path(options.trace), options.keep)
    present("attach", options.format, attachment)
    recording = options.keep == "events" or not any(worker.not_recorded for worker in attachment.workers)
    return CLEAN if recording else FOUND


def attach(workers: Sequence[ProcessTrace], trace: Path, keep: str) -> Attachment:
    """Request a level from the running workers of a trace, and wait for all answers.

    Raises:
        ProbeError: none of them runs, or one does not answer.
    """
    from lora_probe.recording.control import request_level

    running = [worker for worker in workers if worker.running]
    if not running:
        raise _nothing_runs(workers, trace)
    folder = running[0].folder.parent
    try:
        control = request_level(folder, keep)  # type: ignore[arg-type]
    except OSError as error:
        raise ProbeError(f"cannot write into `{folder}`: {error.strerror or error}") from error
    answers = [_answer(worker, control.request, time.monotonic() + PATIENCE) for worker in running]
    return Attachment(
        str(trace),
        keep,
        tuple(
            Worker(before.folder.name, before.process.keep, after.not_recorded)
            for before, after in zip(running, answers, strict=True)
        ),
    )


def _answer(worker: ProcessTrace, request: str, deadline: float) -> Process:
    """The worker's process.json, once it names the request."""
    from lora_probe.recording import Process
    from lora_probe.recording.alive import is_running
    from lora_probe.recording.documents import document

    while (process := document(worker.folder / "process.json", Process)).control != request:
        if process.closed or not is_running(process.pid, process.host, process.began):
            raise ProbeError(f"`{worker.folder.name}` ended before it answered")
        if time.monotonic() > deadline:
            raise ProbeError(
                f"`{worker.folder.name}` (process {process.pid}) did not answer within {PATIENCE:g} s",
                "only lora-probe-vllm of this version or newer answers, and only while the probe is active: "
                "see the server's log",
            )
        time.sleep(PAUSE)
    return process


def _nothing_runs(workers: Sequence[ProcessTrace], trace: Path) -> ProbeError:
    if not workers:
        return ProbeError(
            f"no engine has recorded into `{trace}` yet",
            "start the server with LORA_PROBE_TRACE set to this folder",
        )
    if all(worker.process.closed for worker in workers):
        return ProbeError(f"the recording in `{trace}` is closed", f"see what it holds: lora-probe show {trace}")
    pids = ", ".join(str(worker.process.pid) for worker in workers if not worker.process.closed)
    return ProbeError(
        f"the engine that recorded into `{trace}` does not run on this machine any more (process {pids})",
        "run `attach` where the server runs: in the same container, if it runs in one",
    )


COMMAND = Command(
    "attach",
    "change how much a running engine records, without a restart",
    "  lora-probe attach run.lptrace --keep norms\n"
    "  lora-probe attach run.lptrace --keep events\n"
    "  lora-probe attach run.lptrace --keep shrink --format json",
    add_arguments,
    run,
)
