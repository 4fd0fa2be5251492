"""`lora-probe trace`: an adapter in a real engine. In: options. Out: a trace, the text of it, and the exit status."""

from __future__ import annotations

import argparse

from lora_probe.cli.options import (
    HERE,
    Command,
    UsageError,
    add_checkpoint,
    add_engine,
    add_limits,
    add_prompts,
    apply_limits,
    engine_options,
    prompts,
)
from lora_probe.cli.show import present_trace
from lora_probe.cli.trace_server import SERVER, SERVER_OPTIONS, add_server, run_server, value_of
from lora_probe.errors import command_line
from lora_probe.files.extensions import engine_names
from lora_probe.render.console import hint, note
from lora_probe.render.progress import run_progress, status_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser, None)
    parser.add_argument(
        "--engine",
        required=True,
        metavar="ENGINE",
        help="peft, vllm (needs lora-probe-vllm), or server: one that runs already, with nothing installed in it",
    )
    add_prompts(parser)
    parser.add_argument(
        "--follow", metavar="REF.lptrace", help="run the tokens of another trace: its prompts and its answers"
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="CKPT2",
        help="one more adapter, may be repeated: each prompt runs in one batch, for the base model and every adapter",
    )
    parser.add_argument(
        "--together", action="store_true", help="all adapters active at once instead, as PEFT's set_adapter does it"
    )
    parser.add_argument(
        "--keep",
        choices=("events", "norms", "shrink", "tensors"),
        default="shrink",
        help="how much of each row is recorded; default: shrink",
    )
    parser.add_argument(
        "-o", "--output", metavar="RUN.lptrace", help="default: CKPT-ENGINE.lptrace in the current folder"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing trace")
    parser.add_argument("--events", action="store_true", help="print every step of the load timeline")
    add_engine(parser, "auto means bfloat16 for a float32 model in vLLM")
    add_server(parser)
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.engines.launch import LOG, trace

    if options.engine == SERVER:
        return run_server(options)
    if given := [option for option in SERVER_OPTIONS if value_of(options, option) is not None]:
        raise UsageError(f"{given[0]} needs --engine {SERVER}, not {options.engine}", "lora-probe trace --help")
    where = f" in `{options.output}`" if options.output else ""
    again = "; overwrite it with --force" if options.output else ""
    apply_limits(options, f"the recording{where} is incomplete{again}; nothing is left running")
    with status_line(f"{options.engine}: starting") as report:
        recorded = trace(
            options.checkpoint or HERE,
            engine=options.engine,
            model=options.model,
            prompts=prompts(options),
            chat=options.chat,
            max_tokens=options.max_tokens,
            follow=options.follow,
            beside=options.beside,
            together=options.together,
            keep=options.keep,
            out=options.output,
            force=options.force,
            options=engine_options(options),
            engine_args=options.engine_args,
            progress=run_progress(options.engine, report),
        )
    status = present_trace(recorded, options)
    note(f"wrote {recorded.path}; the engine's log is {recorded.path / LOG}")
    for command in next_commands(options, str(recorded.path)):
        hint(command)
    return status


def next_commands(options: argparse.Namespace, recorded: str) -> list[str]:
    """Compare the trace with the one that it followed; or record another one first, and compare with that."""
    if options.follow is not None:
        return [command_line(["lora-probe", "compare", options.follow, recorded])]
    if options.together:
        # No other engine applies several adapters at once.
        return []
    return [same_with_another_engine(options), command_line(["lora-probe", "compare", recorded, "OTHER.lptrace"])]


def same_with_another_engine(options: argparse.Namespace) -> str:
    """The same command for another engine, to compare with."""
    other = next(name for name in engine_names() if name != options.engine)
    words: list[str] = []
    skip = False
    for word, before in zip(options.own_arguments, ["", *options.own_arguments], strict=False):
        if skip or word in ("-o", "--output", "--force"):
            skip = word in ("-o", "--output")
            continue
        words.append(other if before == "--engine" else word.replace(f"--engine={options.engine}", f"--engine={other}"))
    return command_line(["lora-probe", *words, "-o", "OTHER.lptrace"])


COMMAND = Command(
    "trace",
    "run an adapter in a real engine, and record how it is loaded and what it contributes",
    "  lora-probe trace ckpt/ --engine peft\n"
    "  lora-probe trace ckpt/ --engine vllm --dtype float32 --prompt 'Who are you?' -o run.lptrace\n"
    "  lora-probe trace ckpt/ --engine vllm --max-lora-rank 64 -- --gpu-memory-utilization 0.5\n"
    "  lora-probe trace ckpt/ --engine vllm --beside other/ --beside third/\n"
    "  lora-probe trace --engine server --url http://localhost:8000 --adapter my-adapter\n"
    "  lora-probe trace ckpt/ --engine server --url http://localhost:8000 --adapter my-adapter",
    add_arguments,
    run,
    engine_flags=True,
)
