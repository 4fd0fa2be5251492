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
    parser.add_argument("--adapter", metavar="NAME", help="only this adapter; default: each one that both traces have")
    parser.add_argument(
        "--rtol",
        type=number("relative tolerance", least=0),
        metavar="X",
        help="relative tolerance; default: measured for the coarser dtype of both runs",
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.comparison import compare_each
    from lora_probe.recording import open_trace

    apply_limits(options)
    limits.begin(Path(options.reference), Path(options.candidate))
    traces = open_trace(options.reference), open_trace(options.candidate)
    comparisons = compare_each(*traces, options.rtol, options.adapter)
    if len(comparisons.by_adapter) > 1 or comparisons.notes:
        present("compare adapters", options.format, comparisons)
    else:
        present("compare", options.format, *comparisons.by_adapter.values())
    return CLEAN if comparisons.verdict == "agree" else FOUND


COMMAND = Command(
    "compare",
    "compare two traces, and show where they first diverge",
    "  lora-probe compare peft.lptrace vllm.lptrace\n"
    "  lora-probe compare a.lptrace b.lptrace --rtol 1e-3\n"
    "  lora-probe compare mixed-peft.lptrace mixed-vllm.lptrace --adapter support",
    add_arguments,
    run,
)
