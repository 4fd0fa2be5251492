"""What several commands share: the parser of a command, arguments that more than one has, and what they mean.

In: a parser, or parsed options. Out: arguments of the parser; a budget, prompts, engine options.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

from rich_argparse import RawDescriptionRichHelpFormatter

from lora_probe import precision
from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.files.limits import MEMORY, SECONDS, Budget
from lora_probe.render.console import Detail
from lora_probe.render.formats import DEFAULT, VERDICTS, Names

DTYPES = ("auto", *(dtype.name for dtype in precision.DTYPES if dtype.fits_float32))
HERE = "."
"""The checkpoint if none is passed."""
NARROW = 60
"""The columns of a narrow terminal."""
LEAST = 1 / 16
"""GiB of memory without which Python itself does not run."""
MOST = 1e6
"""Seconds, or GiB, that no folder can need."""


@dataclass(frozen=True)
class Command:
    """A command: its arguments and its run, which returns the exit status.

    `about` and `examples` are the first and the last lines of its help. With `engine_flags`, the words after `--` are
    flags of the engine; other commands take them as paths.
    """

    name: str
    about: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    engine_flags: bool = False


class UsageError(ProbeError):
    """A command line that cannot be parsed."""


class Parser(argparse.ArgumentParser):
    """Raises errors of usage, so that they are printed like all others."""

    def error(self, message: str) -> Any:
        raise UsageError(message, f"{self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises UsageError: there are unknown words. If one is the name of a file, the hint is how to pass it."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [f"to pass `{word}`, write ./{word}" for word in unknown if os.path.lexists(word)]
            hint = "\n".join([*names, f"{self.prog} --help"])
            raise UsageError(f"unrecognized arguments: {' '.join(unknown)}", hint)
        return parsed


class Interspersed(Parser):
    """Accepts options between any number of positional arguments: `check a/ --strict b/`."""

    _within = False

    def format_usage(self) -> str:
        """The usage without colours: argparse keeps it without its first seven characters, `usage: `."""
        formatter = argparse.HelpFormatter(self.prog)
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        return formatter.format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._within:
            return super().parse_known_args(args, namespace)
        self._within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False


def add_command(commands: Any, command: Command) -> None:
    """Add a command with `--format` and its own arguments."""
    parser = commands.add_parser(
        command.name,
        help=command.about,
        description=f"{command.about[0].upper()}{command.about[1:]}.",
        epilog="\n".join(["examples:", *map(_narrow, command.examples.split("\n"))]),
        formatter_class=RawDescriptionRichHelpFormatter,
    )
    parser.set_defaults(command=command.name)
    parser.add_argument(
        "--format",
        choices=Names(command.name),
        default=DEFAULT,
        metavar="FORMAT",
        help=f"output format: %(choices)s; default: {DEFAULT}",
    )
    if command.name in VERDICTS:
        detail = parser.add_mutually_exclusive_group()
        detail.add_argument("-q", "--quiet", action="store_true", help="print the verdict alone, in one line")
        detail.add_argument("-v", "--verbose", action="store_true", help="print everything: all layers, all steps")
    command.add_arguments(parser)


def detail_of(options: argparse.Namespace) -> Detail:
    """How much is printed."""
    if getattr(options, "quiet", False):
        return "quiet"
    return "verbose" if getattr(options, "verbose", False) else "normal"


def _narrow(example: str) -> str:
    """A command in lines that fit a narrow terminal, which would break it inside a word."""
    lines = [" "]
    for word in re.findall(r"(?:'[^']*'|[^ '])+", example):
        if len(f"{lines[-1]} {word} \\") > NARROW:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def add_checkpoint(parser: argparse.ArgumentParser, default: str | None = HERE, described: str = HERE) -> None:
    """One adapter. `default` is its value if it is not passed, `described` in the help."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=default,
        metavar="CKPT",
        help="adapter folder, training output folder (its last checkpoint is used), or the id of an adapter in the "
        f"local Hugging Face cache; default: {described}",
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    """The limits for reading untrusted files."""
    group = parser.add_argument_group("limits", "for untrusted files; a folder that exceeds a limit is not judged")
    group.add_argument(
        "--timeout",
        type=number("number of seconds", above=0, below=MOST),
        metavar="SECONDS",
        help=f"CPU time per folder; default: {SECONDS}, or more for large weights",
    )
    group.add_argument(
        "--max-memory",
        type=number("number of GiB", least=LEAST, below=MOST),
        metavar="GIB",
        help=f"memory per folder; default: {MEMORY / 2**30:.2f}, or more for large weights",
    )


def number(what: str, *, above: float = -inf, least: float = -inf, below: float = inf) -> Callable[[str], float]:
    """The type of an argument that is a number in a range."""

    def parse(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = nan
        if not (above < value < below and value >= least):
            expected = f"of at least {least:g}" if least > above else f"greater than {above:g}"
            raise argparse.ArgumentTypeError(f"`{word}` is not a valid {what}: expected a number {expected}")
        return value

    return parse


def budget(options: argparse.Namespace) -> Budget:
    """The limits for one folder."""
    memory = options.max_memory
    return Budget(options.timeout, None if memory is None else int(memory * 2**30))


def apply_limits(options: argparse.Namespace, left: str = "") -> None:
    """Set the limits for the rest of this command. `left` is printed if it is interrupted: what it leaves behind."""
    limits.allow(budget(options), left)


def add_prompts(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The base model, and what is generated with it."""
    parser.add_argument("--model", metavar="BASE", help="base model: a folder or an id; default: the adapter's own")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; default: three built-in prompts"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="file with one prompt per line; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template to each prompt")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="tokens per answer; default: 32")


def prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the command line, then those of the file."""
    return [*(options.prompt or []), *(_prompts_in(options.prompt_file) if options.prompt_file else [])]


def _prompts_in(path: str) -> list[str]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"cannot read the prompts in `{path}`: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ProbeError(f"`{path}` contains no prompts", "write one prompt on each line")
    return lines


def add_engine(parser: argparse.ArgumentParser, dtype: str, *, running: bool = True) -> None:
    """Options of the engine. `dtype` is the help of `--dtype`, `running` whether the command starts an engine."""
    more = "; pass any other vLLM flag after --" if running else ""
    engine = parser.add_argument_group("engine", f"named as in vLLM{more}")
    engine.add_argument("--dtype", choices=DTYPES, help=dtype)
    engine.add_argument("--lora-dtype", choices=DTYPES, help="dtype of the adapter; default: as the model")
    rank = "vLLM's default, 16" if running else "large enough for the adapter (vLLM's own default is 16)"
    engine.add_argument("--max-lora-rank", type=int, metavar="R", help=f"default: {rank}")
    engine.add_argument("--max-loras", type=int, metavar="N", help="adapters in one batch; default: vLLM's default")
    if running:
        engine.add_argument(
            "--max-model-len", type=int, metavar="N", help="default: 4096, or less if the base model has less"
        )
    engine.add_argument("--tensor-parallel-size", type=int, metavar="N", help="default: 1")
    engine.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="NAME",
        help="the only modules that may have LoRA; takes all words that follow, so put CKPT first",
    )


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the engine by their names in vLLM's Python API."""
    from lora_probe.rules.vllm_versions import ENGINE_OPTIONS

    return {name: getattr(options, name) for name in ENGINE_OPTIONS if hasattr(options, name)}
