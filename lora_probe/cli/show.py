"""`lora-probe show`: a recorded trace. In: options. Out: the text of the trace, and the exit status."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN, FOUND, UNJUDGED
from lora_probe.cli.options import Command, add_limits, apply_limits
from lora_probe.errors import UnreadableFile
from lora_probe.files import limits
from lora_probe.render.formats import DEFAULT, present
from lora_probe.render.results import Recording

if TYPE_CHECKING:
    from lora_probe.recording import Trace

EVERY = 1.0
"""Seconds between two looks at a recording that is followed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="RUN.lptrace", help="folder of a recorded trace")
    parser.add_argument("--adapter", metavar="NAME", help="show only the adapter of this name")
    parser.add_argument("--load", type=int, metavar="N", help="show only the load of this number, in full")
    parser.add_argument("--requests", action="store_true", help="show the recorded rows of each request")
    parser.add_argument("--all", action="store_true", help="show every load and request, not only the last ones")
    parser.add_argument("--events", action="store_true", help="print every step of the load timeline")
    parser.add_argument(
        "--follow", action="store_true", help="show the trace again whenever it changes, until it ends or Ctrl-C"
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    apply_limits(options)
    if options.follow:
        return _follow(options)
    result = _opened(options)
    present(options.command, options.format, result)
    return _status(result)


def present_trace(trace: Trace, options: argparse.Namespace) -> int:
    """Print a trace, and turn its ledgers into an exit status."""
    result = Recording(trace, options.events)
    present(options.command, options.format, result)
    return _status(result)


def _opened(options: argparse.Namespace) -> Recording:
    """The trace as it is now, within a new budget."""
    from lora_probe.recording import open_trace

    limits.begin(Path(options.trace))
    trace = open_trace(options.trace)
    return Recording(trace, options.events, options.adapter, options.load, options.requests, options.all)


def _status(result: Recording) -> int:
    from lora_probe.comparison.recorded import running, unfinished

    trace = result.trace
    if not result.adapters:
        return CLEAN if running(trace) else UNJUDGED
    whole = trace.processes and not unfinished(trace)
    return CLEAN if whole and all(entry.sound for adapter in result.adapters for entry in adapter.loads) else FOUND


def _follow(options: argparse.Namespace) -> int:
    """Show the trace whenever its files change, until no process writes it."""
    from lora_probe.comparison.recorded import running
    from lora_probe.render.live import display

    before: object = None
    with display(options.command, options.format, live=options.format == DEFAULT) as draw:
        while True:
            now = _files(Path(options.trace))
            if now != before:
                try:
                    result = _opened(options)
                    draw(result)
                except UnreadableFile:
                    # A segment may have been removed between two looks; then there is another look.
                    if before is None or now == _files(Path(options.trace)):
                        raise
                    continue
                before = now
            # A process that was killed changes no file.
            if not running(result.trace):
                return _status(result)
            limits.run_until_interrupted()
            time.sleep(EVERY)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """The name, size and time of every file of a trace: what changes when something is recorded."""
    files = []
    for path in folder.glob("*/*"):
        try:
            status = path.stat()
        except OSError:
            continue
        files.append((str(path), status.st_size, status.st_mtime_ns))
    return sorted(files)


COMMAND = Command(
    "show",
    "show a recorded trace, also while it is recorded, without running an engine",
    "  lora-probe show run.lptrace\n"
    "  lora-probe show run.lptrace --adapter my-adapter --requests\n"
    "  lora-probe show run.lptrace --follow\n"
    "  lora-probe show run.lptrace --format json | jq .headline",
    add_arguments,
    run,
)
