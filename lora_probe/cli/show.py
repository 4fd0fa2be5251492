"""`lora-probe show`: a recorded trace. In: options. Out: the text of the trace, and the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN, FOUND, UNJUDGED
from lora_probe.cli.options import Command, add_limits, apply_limits
from lora_probe.files import limits
from lora_probe.render.formats import present
from lora_probe.render.results import Recording

if TYPE_CHECKING:
    from lora_probe.recording import Trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="RUN.lptrace", help="folder of a recorded trace")
    parser.add_argument("--events", action="store_true", help="print every step of the load timeline")
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.recording import open_trace

    apply_limits(options)
    limits.begin(Path(options.trace))
    return present_trace(open_trace(options.trace), options)


def present_trace(trace: Trace, options: argparse.Namespace) -> int:
    """Print a trace, and turn its ledgers and what went wrong for requests into an exit status."""
    present(options.command, options.format, Recording(trace, options.events))
    if not trace.loads:
        return UNJUDGED
    return CLEAN if trace.healthy else FOUND


COMMAND = Command(
    "show",
    "show a recorded trace, without running an engine",
    "  lora-probe show run.lptrace\n"
    "  lora-probe show run.lptrace --events\n"
    "  lora-probe show run.lptrace --format json | jq .headline",
    add_arguments,
    run,
)
