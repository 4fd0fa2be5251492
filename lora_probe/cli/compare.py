"""`lora-probe compare`: two traces. In: options. Out: the comparison, and the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_probe.cli.ending import CLEAN, FOUND
from lora_probe.cli.options import Command, add_limits, apply_limits, number
from lora_probe.files import limits
from lora_probe.render.formats import present


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="REFERENCE", help="trace of the run that is taken as correct")
    parser.add_argument("candidate", metavar="CANDIDATE", help="trace of the run that is compared with it")
    parser.add_argument(
        "--rtol",
        type=number("relative tolerance", least=0),
        metavar="X",
        help="relative tolerance; default: measured for the coarser dtype of both runs",
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.comparison import compare
    from lora_probe.recording import open_trace

    apply_limits(options)
    limits.begin(Path(options.reference), Path(options.candidate))
    comparison = compare(open_trace(options.reference), open_trace(options.candidate), options.rtol)
    present("compare", options.format, comparison)
    return CLEAN if comparison.verdict == "agree" else FOUND


COMMAND = Command(
    "compare",
    "compare two traces, and show where they first diverge",
    "  lora-probe compare peft.lptrace vllm.lptrace\n  lora-probe compare a.lptrace b.lptrace --rtol 1e-3",
    add_arguments,
    run,
)
