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
from importlib import import_module

from rich_argparse import RawDescriptionRichHelpFormatter

from lora_probe import __version__
from lora_probe.cli.completion import SHELLS, PrintCompletion
from lora_probe.cli.ending import supervised
from lora_probe.cli.options import Command, Interspersed, Parser, add_command, detail_of
from lora_probe.render.console import heed_columns, set_detail

NAMES = (
    "inspect", "check", "trace", "show", "attach", "collect", "compare", "parity", "cost", "rule", "env",
)  # fmt: skip
"""The commands in the order of `--help`; each is the module of that name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command in a process of its own, and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return supervised(lambda: run(arguments), arguments)


def run(arguments: list[str]) -> int:
    """Run one command in this process. Raises ProbeError, and SystemExit after `--help`."""
    heed_columns()
    own, flags = _split(arguments)
    options = argparse.Namespace()
    parser_of_all(own[0] if own and own[0] in NAMES else None).parse_args(own, options)
    options.engine_args, options.own_arguments = flags, own
    set_detail(detail_of(options))
    return command_of(options.command).run(options)


def command_of(name: str) -> Command:
    """A command by its name. Its module is imported now."""
    command: Command = import_module(f"lora_probe.cli.{name}").COMMAND
    return command


def parser_of_all(requested: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or of the one that is requested alone: the others need not be imported. `command` in
    the parsed options is the command's name."""
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
    for name in NAMES if requested is None else (requested,):
        add_command(commands, command_of(name))
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the engine's after the first `--`. For commands without engine flags, `--` is followed by
    paths, and one that begins with a dash is not an option."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    own, rest = arguments[:at], arguments[at + 1 :]
    if own and own[0] in NAMES and command_of(own[0]).engine_flags:
        return own, rest
    return [*own, *(f"./{word}" if word.startswith("-") else word for word in rest)], []
