"""`lora-probe cost`: what an adapter costs to serve. In: options. Out: memory, flags that fit, and the slowdown."""

from __future__ import annotations

import argparse

from lora_probe.cli.ending import CLEAN
from lora_probe.cli.options import Command, add_checkpoint, add_engine, add_limits, apply_limits, engine_options
from lora_probe.render.console import remarks
from lora_probe.render.formats import DEFAULT, present
from lora_probe.render.progress import status_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument("--model", metavar="BASE", help="base model: a folder, or an id in the local cache")
    parser.add_argument(
        "--benchmark", metavar="BENCH.json", help="show what `pytest benchmarks/ --benchmark-json` measured beside it"
    )
    add_engine(parser, "dtype of the model in vLLM; default: 16 bits", running=False)
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.checking.cost import cost

    apply_limits(options)
    with status_line("looking at the files") as report:
        result = cost(
            options.checkpoint,
            model=options.model,
            options=engine_options(options),
            benchmark=options.benchmark,
            progress=lambda text: report(text, passing=True),
        )
    if options.format == DEFAULT:
        remarks(result.adapter.notes)
    present("cost", options.format, result)
    return CLEAN


COMMAND = Command(
    "cost",
    "show what an adapter costs to serve: memory, flags that fit, slowdown",
    "  lora-probe cost ckpt/ --model base/\n"
    "  lora-probe cost ckpt/ --max-lora-rank 64 --max-loras 8\n"
    "  lora-probe cost ckpt/ --benchmark BENCH.json\n"
    "  lora-probe cost ckpt/ --format json | jq .fitting",
    add_arguments,
    run,
)
