"""The command line: `lora-probe`. In: arguments. Out: text or JSON on standard output, hints and progress on standard
error, and the exit status: 0 judged and nothing wrong, 1 something found or undecided, 2 nothing could be judged, or
two runs could not be compared completely.

Heavy modules are imported by the command that needs them. Commands that read untrusted files run in a process of their
own, within the limits of `--timeout` and `--max-memory` (`guarded.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich_argparse import RawDescriptionRichHelpFormatter

from lora_probe import __version__
from lora_probe.cli import attach, check, collect, compare, cost, env, inspect, parity, rule, show, trace
from lora_probe.cli.completion import SHELLS, PrintCompletion
from lora_probe.cli.ending import supervised
from lora_probe.cli.options import Interspersed, Parser, add_command, detail_of
from lora_probe.render.console import heed_columns, set_detail

COMMANDS = {
    command.name: command
    for command in (
        inspect.COMMAND,
        check.COMMAND,
        trace.COMMAND,
        show.COMMAND,
        attach.COMMAND,
        collect.COMMAND,
        compare.COMMAND,
        parity.COMMAND,
        cost.COMMAND,
        rule.COMMAND,
        env.COMMAND,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command in a process of its own, and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return supervised(lambda: run(arguments), arguments)


def run(arguments: list[str]) -> int:
    """Run one command in this process. Raises ProbeError, and SystemExit after `--help`."""
    heed_columns()
    own, flags = _split(arguments)
    options = argparse.Namespace()
    parser_of_all(own[0] if own and own[0] in COMMANDS else None).parse_args(own, options)
    options.engine_args, options.own_arguments = flags, own
    set_detail(detail_of(options))
    return COMMANDS[options.command].run(options)


def parser_of_all(requested: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands; if one is requested, only that one has its arguments. `command` in the parsed options
    is the command's name."""
    parser = Parser(
        prog="lora-probe",
        description="Follow a LoRA adapter from its checkpoint to the tokens that an engine generates with it.",
        formatter_class=RawDescriptionRichHelpFormatter,
        epilog="examples:\n  lora-probe inspect ckpt/ --norms\n  lora-probe check ckpt/\n"
        "  lora-probe trace ckpt/ --engine vllm --dtype float32",
    )
    parser.add_argument("--version", action="version", version=f"lora-probe {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help=f"print the completion script for a shell: {', '.join(SHELLS)}",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Interspersed)
    for command in COMMANDS.values():
        add_command(commands, command, requested in (None, command.name))
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the engine's after the first `--`. For commands without engine flags, `--` is followed by
    paths, and one that begins with a dash is not an option."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    own, rest = arguments[:at], arguments[at + 1 :]
    if own and own[0] in COMMANDS and COMMANDS[own[0]].engine_flags:
        return own, rest
    return [*own, *(f"./{word}" if word.startswith("-") else word for word in rest)], []
