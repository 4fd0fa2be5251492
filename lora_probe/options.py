"""The options of every command. In: nothing. Out: a parser; what the commands do with the options is in `cli.py`.

Each command's help ends with examples that work as they stand, given a checkpoint.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich_argparse import RawDescriptionRichHelpFormatter

from lora_probe import __version__
from lora_probe.errors import ProbeError

DTYPES = ("auto", "float32", "float16", "bfloat16")


class UsageError(ProbeError):
    """A command line that is not understood."""


class _Parser(argparse.ArgumentParser):
    """Raises errors of usage, so that they look like all others."""

    def error(self, message: str) -> Any:
        raise UsageError(message, f"{self.prog} --help")


def parser_of_all() -> argparse.ArgumentParser:
    """The whole parser; `command` of what it parses is the command's name, `interrupted` its last word."""
    parser = _Parser(
        prog="lora-probe",
        description="See what a LoRA adapter does between its checkpoint and the tokens of an engine.",
        formatter_class=RawDescriptionRichHelpFormatter,
        epilog="examples:\n  lora-probe inspect ckpt/ --norms\n  lora-probe trace ckpt/ --engine vllm --dtype float32",
    )
    parser.add_argument("--version", action="version", version=f"lora-probe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_trace(commands)
    _add_show(commands)
    _add_compare(commands)
    _add_parity(commands)
    _add_rule(commands)
    _add_env(commands)
    return parser


def _command(commands: Any, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"examples:\n{examples}",
        formatter_class=RawDescriptionRichHelpFormatter,
    )
    parser.set_defaults(command=name)
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "show what an adapter checkpoint holds",
        "  lora-probe inspect ckpt/\n  lora-probe inspect ckpt/ --norms\n"
        "  lora-probe inspect ckpt/ --format json | jq '.modules | length'",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--norms", action="store_true", help="read the values: ‖s·B·A‖ and effective rank of each module"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=".",
        metavar="CKPT",
        help="an adapter folder, or a training output folder (its last checkpoint is taken); default: .",
    )


def _add_trace(commands: Any) -> None:
    parser = _command(
        commands,
        "trace",
        "run an adapter in a real engine and record loading and contributions",
        "  lora-probe trace ckpt/ --engine peft\n"
        "  lora-probe trace ckpt/ --engine vllm --dtype float32 --prompt 'Who are you?' -o run.lptrace\n"
        "  lora-probe trace ckpt/ --engine vllm --max-lora-rank 64 -- --gpu-memory-utilization 0.5",
    )
    _add_checkpoint(parser)
    parser.add_argument("--engine", required=True, metavar="ENGINE", help="peft or vllm (needs lora-probe-vllm)")
    _add_asking(parser)
    parser.add_argument(
        "--follow", metavar="REF.lptrace", help="see the tokens of another trace: its prompts and its answers"
    )
    parser.add_argument(
        "--keep",
        choices=("events", "norms", "shrink", "tensors"),
        default="shrink",
        help="how much of each row; default: shrink",
    )
    parser.add_argument("-o", "--output", metavar="RUN.lptrace", help="default: CKPT-ENGINE.lptrace here")
    parser.add_argument("--force", action="store_true", help="overwrite an existing trace")
    parser.add_argument("--events", action="store_true", help="print every step of the loading story")
    _add_engine(parser, "auto in vLLM makes bfloat16 of float32")


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="BASE", help="base model, a folder or an id; default: the adapter's own")
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be given more than once; default: three built-in ones"
    )
    parser.add_argument("--prompt-file", metavar="FILE", help="one prompt a line; - for standard input")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the tokenizer's chat template")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="length of an answer; default: 32")


def _add_engine(parser: argparse.ArgumentParser, dtype: str) -> None:
    engine = parser.add_argument_group("engine", "spelled as vLLM spells them; any other vLLM flag goes after --")
    engine.add_argument("--dtype", choices=DTYPES, help=dtype)
    engine.add_argument("--lora-dtype", choices=DTYPES)
    engine.add_argument("--max-lora-rank", type=int, metavar="R", help="default: vLLM's own, 16")
    engine.add_argument("--max-loras", type=int, metavar="N")
    engine.add_argument("--max-model-len", type=int, metavar="N", help="default: 4096, or less if the base has less")
    engine.add_argument("--tensor-parallel-size", type=int, metavar="N")
    engine.add_argument("--lora-target-modules", nargs="+", metavar="NAME")


def _add_parity(commands: Any) -> None:
    parser = _command(
        commands,
        "parity",
        "check a merge: are the weights base plus adapter, and does the effect survive",
        "  lora-probe parity ckpt/ --dtype bfloat16\n"
        "  lora-probe parity ckpt/ --merged merged/ --weights-only\n"
        "  lora-probe parity ckpt/ --merged merged/ --engine vllm --prompt 'Who are you?'\n"
        "  lora-probe parity ckpt/ --merged merged/ --weights-only --format json | jq -r .verdict",
    )
    _add_checkpoint(parser)
    parser.add_argument("--merged", metavar="DIR", help="the merged model; default: PEFT makes the merge, in --dtype")
    parser.add_argument(
        "--weights-only", action="store_true", help="compare files, run no engine (with --merged: no torch)"
    )
    parser.add_argument("--engine", metavar="ENGINE", help="what runs both models; default: peft")
    _add_asking(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="keep the merge, both traces (see `show`) and parity.json here"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what an earlier parity kept")
    _add_engine(parser, "of the merge that PEFT makes, and of the runs; default: as the base or the merge is stored")


def _add_show(commands: Any) -> None:
    parser = _command(
        commands,
        "show",
        "show a recorded trace again, from its files alone",
        "  lora-probe show run.lptrace\n  lora-probe show run.lptrace --events\n"
        "  lora-probe show run.lptrace --format json | jq .headline",
    )
    parser.add_argument("trace", metavar="RUN.lptrace")
    parser.add_argument("--events", action="store_true", help="print every step of the loading story")


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        "hold two traces against each other: where do they first part",
        "  lora-probe compare peft.lptrace vllm.lptrace\n  lora-probe compare a.lptrace b.lptrace --rtol 1e-3",
    )
    parser.add_argument("reference", metavar="REFERENCE")
    parser.add_argument("candidate", metavar="CANDIDATE")
    parser.add_argument(
        "--rtol", type=_tolerance, metavar="X", help="relative tolerance; default: from the coarser dtype"
    )


def _tolerance(word: str) -> float:
    value = float(word)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is no relative tolerance: a number from 0 is")
    return value


def _add_rule(commands: Any) -> None:
    parser = _command(commands, "rule", "explain a rule", "  lora-probe rule\n  lora-probe rule LP201")
    parser.add_argument(
        "code", nargs="?", metavar="CODE", help="a rule, or a family as LP7xx; default: a line for every rule"
    )


def _add_env(commands: Any) -> None:
    _command(commands, "env", "the versions block for a bug report", "  lora-probe env")
