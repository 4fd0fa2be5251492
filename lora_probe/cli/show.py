"""`lora-probe show`: a recorded trace. In: options. Out: the text of the trace, and the exit status."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN, FOUND, UNJUDGED
from lora_probe.cli.options import Command, UsageError, add_limits, apply_limits
from lora_probe.errors import UnreadableFile
from lora_probe.files import limits
from lora_probe.render.console import note
from lora_probe.render.formats import DEFAULT, present
from lora_probe.render.results import Recording

if TYPE_CHECKING:
    from lora_probe.recording import Trace

EVERY = 1.0
"""Seconds between two looks at a recording that is followed."""
BENCHMARK = ".json"
"""How the name of a saved benchmark ends; a trace is a folder."""
LOOKS = 3
"""How often a trace is read if its files change while it is read."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace", metavar="RUN.lptrace", help="folder of a recorded trace, or a file of pytest-benchmark"
    )
    parser.add_argument("--adapter", metavar="NAME", help="show only the adapter of this name")
    parser.add_argument("--load", type=int, metavar="N", help="show only the load of this number, in full")
    parser.add_argument("--requests", action="store_true", help="show the recorded rows of each request")
    parser.add_argument("--all", action="store_true", help="show every load and request, not only the last ones")
    parser.add_argument("--events", action="store_true", help="print every step of the load timeline")
    parser.add_argument(
        "--follow", action="store_true", help="show the trace again whenever it changes, until it ends or Ctrl-C"
    )
    parser.add_argument(
        "--bundle", metavar="BUG.zip", help="write a bug report: versions, configs, ledger and timeline, no prompts"
    )
    parser.add_argument(
        "other", nargs="?", metavar="OTHER.lptrace", help="with --module: a second trace, to be read beside the first"
    )
    layer = parser.add_argument_group("one layer", "the numbers of one token in it: x, x·Aᵀ, s·x·A·B, base output")
    layer.add_argument("--module", metavar="NAME", help="path of a module, or the unique end of it")
    layer.add_argument("--request", metavar="ID", help="default: the first one with an adapter; see --requests")
    layer.add_argument(
        "--token",
        type=int,
        metavar="N",
        help="position from 0; a negative one counts from the end; default: the last token of the prompt",
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    apply_limits(options)
    if Path(options.trace).suffix.lower() == BENCHMARK and not Path(options.trace).is_dir():
        return _show_benchmark(options)
    if options.module is not None:
        return _show_module(options)
    for option, value in (("OTHER.lptrace", options.other), ("--request", options.request), ("--token", options.token)):
        if value is not None:
            raise UsageError(f"{option} needs --module", "two traces: lora-probe compare")
    if options.follow:
        return _follow(options)
    if options.bundle is not None:
        return _bundle(options)
    return _status(_shown(options, partial(present, options.command, options.format)))


def _show_benchmark(options: argparse.Namespace) -> int:
    """A file of pytest-benchmark: 1 if a target was missed."""
    from lora_probe.recording.benchmarks import open_benchmarks

    if options.other is not None:
        raise UsageError("a benchmark is shown by itself", "to compare two: pytest --benchmark-compare OTHER.json")
    of_traces = ("adapter", "load", "requests", "all", "events", "follow", "bundle", "module", "request", "token")
    for name in of_traces:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise UsageError(f"--{name} is for traces, and `{options.trace}` is a benchmark", "remove the option")
    limits.begin(Path(options.trace))
    result = open_benchmarks(options.trace)
    present("show benchmark", options.format, result)
    return FOUND if any(ratio.missed for _, ratio in result.targets) else CLEAN


def _show_module(options: argparse.Namespace) -> int:
    """One token through one layer, in both traces if there are two."""
    from lora_probe.comparison.walk import beside, walk
    from lora_probe.recording import open_trace

    for option in ("--requests", "--all", "--events", "--follow"):
        if getattr(options, option.removeprefix("--")):
            raise UsageError(f"{option} has no effect with --module", "remove one of the two")
    paths = [path for path in (options.trace, options.other) if path is not None]
    limits.begin(*map(Path, paths))
    trace, *others = map(open_trace, paths)
    first = walk(trace, options.module, options.request, options.token, options.adapter, options.load)
    present("show --module", options.format, [first, *(beside(other, trace, first) for other in others)])
    return CLEAN


def _bundle(options: argparse.Namespace) -> int:
    """Write what a bug report needs."""
    from lora_probe.engines.launch import versions
    from lora_probe.render.bundle import write_bundle

    target = Path(options.bundle)
    result = _shown(options, lambda recording: write_bundle(recording, target, versions()))
    note(f"wrote {target}; it holds no prompts and no answers, but paths on this machine: look through it")
    return _status(result)


def present_trace(trace: Trace, options: argparse.Namespace) -> int:
    """Print a trace, and turn its ledgers into an exit status."""
    result = Recording(trace, options.events or options.verbose)
    present(options.command, options.format, result)
    return _status(result)


def _shown(options: argparse.Namespace, draw: Callable[[Recording], None]) -> Recording:
    """Show the trace as it is now. It may run and remove an old segment meanwhile; then this looks again."""
    folder = Path(options.trace)
    for _ in range(LOOKS - 1):
        files = _files(folder)
        try:
            return _shown_once(options, draw)
        except UnreadableFile:
            if files == _files(folder):
                raise
    return _shown_once(options, draw)


def _shown_once(options: argparse.Namespace, draw: Callable[[Recording], None]) -> Recording:
    from lora_probe.recording import open_trace

    limits.begin(Path(options.trace))
    trace = open_trace(options.trace)
    events, everything = options.events or options.verbose, options.all or options.verbose
    result = Recording(trace, events, options.adapter, options.load, options.requests, everything)
    draw(result)
    return result


def _status(result: Recording) -> int:
    from lora_probe.comparison.recorded import unfinished

    trace = result.trace
    if not result.adapters:
        return CLEAN if trace.running else UNJUDGED
    whole = trace.processes and not unfinished(trace)
    entries = [entry for adapter in result.adapters for entry in adapter.loads]
    return CLEAN if whole and all(entry.sound and not entry.findings for entry in entries) else FOUND


def _follow(options: argparse.Namespace) -> int:
    """Show the trace whenever its files change, until no process writes it."""
    from lora_probe.render.live import display

    limits.run_until_interrupted()
    before: object = None
    with display(options.command, options.format, live=options.format == DEFAULT) as draw:
        while True:
            # Read before the trace is: what comes later is shown at the next look.
            files = _files(Path(options.trace))
            if files != before:
                result, before = _shown(options, draw), files
            # A process that was killed changes no file, and what it left is shown once more.
            if not result.trace.running:
                return _status(_shown(options, draw))
            time.sleep(EVERY)


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """The name, size and time of every file of a trace: what changes when something is recorded."""
    files = []
    # A later run in the same folder has a folder of its own.
    for path in (*folder.glob("*/*"), *folder.glob("*/*/*")):
        try:
            status = path.stat()
        except OSError:
            continue
        files.append((str(path), status.st_size, status.st_mtime_ns))
    return sorted(files)


COMMAND = Command(
    "show",
    "show a recorded trace, also while it is recorded, or a saved benchmark, without running an engine",
    "  lora-probe show run.lptrace\n"
    "  lora-probe show run.lptrace --adapter my-adapter --requests\n"
    "  lora-probe show run.lptrace --follow\n"
    "  lora-probe show run.lptrace --module layers.0.self_attn.q_proj --token -1\n"
    "  lora-probe show peft.lptrace vllm.lptrace --module layers.0.self_attn.q_proj\n"
    "  lora-probe show run.lptrace --format json | jq .headline\n"
    "  lora-probe show BENCH.json --format html > bench.html",
    add_arguments,
    run,
)
