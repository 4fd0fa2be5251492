"""`lora-probe collect`: the recordings of several machines in one trace. In: options. Out: a trace, and its text."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_probe.cli.options import Command, add_limits, apply_limits
from lora_probe.cli.show import present_trace
from lora_probe.files import limits
from lora_probe.render.console import note


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "traces", nargs="+", metavar="DIR", help="trace folders that the nodes of one engine have written"
    )
    parser.add_argument("-o", "--output", required=True, metavar="RUN.lptrace", help="new trace folder")
    parser.add_argument("--events", action="store_true", help="print every step of the load timeline")
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.recording.collecting import collect

    apply_limits(options, f"`{options.output}` was not written")
    folders = [Path(folder) for folder in options.traces]
    limits.begin(*folders)
    trace = collect(folders, Path(options.output))
    status = present_trace(trace, options)
    note(f"wrote {trace.path}")
    return status


COMMAND = Command(
    "collect",
    "join the recordings of several machines that ran one engine",
    "  lora-probe collect node-0.lptrace node-1.lptrace -o run.lptrace\n"
    "  lora-probe collect nodes/*.lptrace -o run.lptrace --format json",
    add_arguments,
    run,
)
