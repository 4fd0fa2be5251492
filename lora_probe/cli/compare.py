"""`lora-probe compare`: two traces, or engines that are recorded first. In: options. Out: the comparison, and the exit
status."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN, FOUND, UNJUDGED
from lora_probe.cli.options import (
    Command,
    UsageError,
    add_checkpoint,
    add_engine,
    add_limits,
    add_prompts,
    apply_limits,
    engine_options,
    number,
    prompts,
)
from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.render.console import note
from lora_probe.render.formats import present
from lora_probe.render.progress import run_progress, status_line

MOST_RUNS = 200
"""Forward passes of a bisection, unless the user passes another number."""

if TYPE_CHECKING:
    from lora_probe.comparison import Comparisons
    from lora_probe.engines.child import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reference", metavar="REFERENCE", help="trace of the run that is taken as correct, or an engine to record"
    )
    parser.add_argument(
        "candidate", metavar="CANDIDATE", help="trace of the run that is compared with it, or an engine to record"
    )
    add_checkpoint(parser, None, "the adapter of the trace on the other side, or .")
    parser.add_argument("--adapter", metavar="NAME", help="only this adapter; default: each one that both traces have")
    parser.add_argument(
        "--rtol",
        type=number("relative tolerance", least=0),
        metavar="X",
        help="relative tolerance; default: measured for the coarser dtype of both runs",
    )
    parser.add_argument(
        "--atol",
        type=number("absolute tolerance", least=0),
        default=0.0,
        metavar="X",
        help="differences of a contribution up to this norm count as none; default: 0.\n"
        "Neither tolerance excuses other weights",
    )
    recorded = parser.add_argument_group(
        "recording",
        "for an engine, peft or vllm; it runs the tokens of the other side,\nand its trace stays in the current folder",
    )
    add_prompts(recorded)
    add_engine(parser, "default: that of the base model's files, in both engines")
    causes = parser.add_argument_group("bisection")
    causes.add_argument(
        "--bisect",
        action="store_true",
        help="find the smallest set of modules whose weights change the first answer token that differs",
    )
    causes.add_argument(
        "--bisect-engine",
        metavar="ENGINE",
        help="the engine that runs the mixtures, peft or vllm; default: that of both runs, and of two different ones\n"
        "PEFT, or vLLM where it held weights that are in no file",
    )
    causes.add_argument(
        "--bisect-runs",
        type=number("number of runs", least=2),
        metavar="N",
        help=f"forward passes at most; default: {MOST_RUNS}",
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.comparison import compare_each
    from lora_probe.comparison.sides import Settings, engines_of, open_sides

    engines = engines_of(options.reference, options.candidate)
    _refuse_unused(options, bool(engines))
    apply_limits(options, "its recordings are incomplete; nothing is left running" if engines else "")
    if recorded := [Path(side) for side in (options.reference, options.candidate) if side not in engines]:
        limits.begin(*recorded)
    settings = Settings(
        options.checkpoint,
        options.model,
        prompts(options),
        options.chat,
        options.max_tokens,
        engine_options(options),
        options.engine_args,
    )
    traces = open_sides(options.reference, options.candidate, settings, _reporting)
    comparisons = compare_each(*traces, options.rtol, options.adapter, atol=options.atol)
    if options.bisect:
        comparisons = _bisected(comparisons, options)
    if len(comparisons.by_adapter) > 1 or comparisons.notes:
        present("compare adapters", options.format, comparisons)
    else:
        present("compare", options.format, *comparisons.by_adapter.values())
    for side, trace in zip((options.reference, options.candidate), traces, strict=True):
        if side in engines:
            note(f"wrote {trace.path}")
    return {"agree": CLEAN, "differ": FOUND, "undecided": UNJUDGED}[comparisons.verdict]


def _bisected(comparisons: Comparisons, options: argparse.Namespace) -> Comparisons:
    """The comparisons, each with the modules that change a token, or with the reason why there are none."""
    from lora_probe.comparison.bisection import bisect

    by_adapter, most = {}, int(options.bisect_runs or MOST_RUNS)
    with status_line("bisection: starting") as report:
        for name, comparison in comparisons.by_adapter.items():
            try:
                bisection = bisect(
                    comparison, most, options.model, run_progress("bisection", report), options.bisect_engine
                )
                by_adapter[name] = replace(comparison, bisection=bisection)
            except ProbeError as error:
                why = f"not bisected: {error.message}"
                by_adapter[name] = replace(comparison, notes=(*comparison.notes, why))
    return replace(comparisons, by_adapter=by_adapter)


def _refuse_unused(options: argparse.Namespace, records: bool) -> None:
    """Raises UsageError: there is something to record, and no engine; or an option of a bisection without one."""
    for name in ("bisect_runs", "bisect_engine"):
        if getattr(options, name) is not None and not options.bisect:
            raise UsageError(f"--{name.replace('_', '-')} belongs to --bisect", "add --bisect")
    if records:
        return
    given = [name for name in ("prompt", "prompt_file", "chat") if getattr(options, name)]
    given += ["model"] if options.model and not options.bisect else []
    given += [name for name, value in engine_options(options).items() if value is not None]
    if options.checkpoint is not None or given or options.engine_args:
        raise UsageError(
            f"`{options.reference}` and `{options.candidate}` are traces, so there is nothing to record",
            "pass only the traces, or name an engine: lora-probe compare peft vllm CKPT",
        )


@contextmanager
def _reporting(engine: str) -> Iterator[Callable[[Progress], None]]:
    with status_line(f"{engine}: starting") as report:
        yield run_progress(engine, report)


COMMAND = Command(
    "compare",
    "compare two traces, or engines that are recorded first: why they differ, where first, and what cures it",
    "  lora-probe compare peft.lptrace vllm.lptrace\n"
    "  lora-probe compare peft vllm ckpt/ --model base/ --prompt 'Who are you?'\n"
    "  lora-probe compare peft.lptrace vllm ckpt/ -- --enforce-eager\n"
    "  lora-probe compare a.lptrace b.lptrace --rtol 1e-3\n"
    "  lora-probe compare healthy.lptrace wrong.lptrace --bisect\n"
    "  lora-probe compare peft.lptrace vllm.lptrace --format markdown\n"
    "  lora-probe compare mixed-peft.lptrace mixed-vllm.lptrace --adapter support",
    add_arguments,
    run,
    engine_flags=True,
)
