"""`lora-probe trace --engine server`: an adapter in a running server.

In: options. Out: a trace, the text of it, and the exit status.
"""

from __future__ import annotations

import argparse
from typing import Any

from lora_probe.cli.options import MOST, UsageError, apply_limits, engine_options, number, prompts
from lora_probe.cli.show import present_trace
from lora_probe.errors import command_line
from lora_probe.render.console import hint, note
from lora_probe.render.progress import run_progress, status_line

SERVER = "server"
SERVER_OPTIONS = ("--url", "--adapter", "--served-base", "--request-timeout")
NOT_THERE = (
    "--follow",
    "--beside",
    "--together",
    "--lora-dtype",
    "--max-lora-rank",
    "--max-loras",
    "--max-model-len",
    "--tensor-parallel-size",
)
"""Options of engines that are started."""


def add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "server",
        "for --engine server: any OpenAI-compatible server; it is not changed\n"
        "without CKPT: whether the adapter changes its answers\n"
        "with CKPT: whether it runs this adapter, as trained (PEFT runs the\n"
        "same tokens); the key is read from OPENAI_API_KEY",
    )
    group.add_argument("--url", metavar="URL", help="for example http://localhost:8000")
    group.add_argument("--adapter", metavar="NAME", help="the adapter's name in the server, as in /v1/models")
    group.add_argument(
        "--served-base", metavar="NAME", help="the base model's name there; default: what the server states"
    )
    group.add_argument(
        "--request-timeout",
        type=number("number of seconds", above=0, below=MOST),
        metavar="SECONDS",
        help="how long to wait for each answer; default: 120",
    )


def run_server(options: argparse.Namespace) -> int:
    from lora_probe.engines.asking import REQUEST_SECONDS, trace_server
    from lora_probe.engines.launch import LOG

    _refuse_missing(options)
    apply_limits(options, "the server still runs as before")
    with status_line(f"{options.url}: asking") as report:
        recorded = trace_server(
            options.url,
            options.adapter,
            checkpoint=options.checkpoint,
            model=options.model,
            served_base=options.served_base,
            prompts=prompts(options),
            chat=options.chat,
            max_tokens=options.max_tokens,
            out=options.output,
            force=options.force,
            dtype=options.dtype or "auto",
            request_timeout=options.request_timeout or REQUEST_SECONDS,
            progress=run_progress(SERVER, report),
        )
    status = present_trace(recorded, options)
    note(f"wrote {recorded.path}; the log is {recorded.path / LOG}")
    if options.checkpoint is None:
        again = command_line(["--engine", SERVER, "--url", options.url, "--adapter", options.adapter])
        hint(f"whether it is the adapter in a folder: lora-probe trace CKPT {again}")
    return status


def value_of(options: argparse.Namespace, option: str) -> Any:
    """The value of an option by its spelling."""
    return getattr(options, option.removeprefix("--").replace("-", "_"))


def _refuse_missing(options: argparse.Namespace) -> None:
    """Raises UsageError: an option is missing, or has no effect on a server."""
    example = f"lora-probe trace --engine {SERVER} --url http://localhost:8000 --adapter NAME"
    for option in ("--url", "--adapter"):
        if not value_of(options, option):
            raise UsageError(f"--engine {SERVER} needs {option}", example)
    given = [option for option in NOT_THERE if value_of(options, option) not in (None, False, [])]
    if engine_options(options).get("lora_target_modules") is not None:
        given.append("--lora-target-modules")
    if given or options.engine_args:
        what = given[0] if given else options.engine_args[0]
        raise UsageError(f"{what} has no effect on a server that runs already", f"remove {what}")
    if options.model is not None and options.checkpoint is None:
        raise UsageError("--model needs the adapter's folder", f"{example} CKPT --model BASE")
