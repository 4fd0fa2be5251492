"""The options of every command. In: nothing. Out: a parser, and what its options come to (prompts, engine options).

What the commands do with them is in `cli/main.py` and `cli/check.py`. Each command's help ends with examples that
work as they stand, given a checkpoint.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich_argparse import RawDescriptionRichHelpFormatter

from lora_probe import __version__, precision
from lora_probe.cli.budget import add_limits
from lora_probe.errors import ProbeError
from lora_probe.rules.vllm_versions import ENGINE_OPTIONS

DTYPES = ("auto", *(dtype.name for dtype in precision.DTYPES if dtype.fits_float32))


class UsageError(ProbeError):
    """A command line that is not understood."""


class _Parser(argparse.ArgumentParser):
    """Raises errors of usage, so that they look like all others."""

    def error(self, message: str) -> Any:
        raise UsageError(message, f"{self.prog} --help")


class _Interspersed(_Parser):
    """Takes options between positional arguments of any number as well: `check a/ --strict b/`."""

    _within = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._within:
            return super().parse_known_args(args, namespace)
        self._within = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._within = False


def parser_of_all() -> argparse.ArgumentParser:
    """The whole parser; `command` of what it parses is the command's name."""
    parser = _Parser(
        prog="lora-probe",
        description="See what a LoRA adapter does between its checkpoint and the tokens of an engine.",
        formatter_class=RawDescriptionRichHelpFormatter,
        epilog="examples:\n  lora-probe inspect ckpt/ --norms\n  lora-probe check ckpt/\n"
        "  lora-probe trace ckpt/ --engine vllm --dtype float32",
    )
    parser.add_argument("--version", action="version", version=f"lora-probe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Interspersed)
    _add_inspect(commands)
    _add_check(commands)
    _add_trace(commands)
    _add_show(commands)
    _add_compare(commands)
    _add_parity(commands)
    _add_rule(commands)
    _add_env(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    about: str,
    examples: str,
    formats: Sequence[str] = ("text", "json"),
    *,
    reads: bool = True,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"examples:\n{examples}",
        formatter_class=RawDescriptionRichHelpFormatter,
    )
    parser.set_defaults(command=name)
    parser.add_argument("--format", choices=formats, default="text", help="default: text")
    if reads:
        add_limits(parser)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "show what an adapter checkpoint holds",
        "  lora-probe inspect ckpt/\n  lora-probe inspect ckpt/ --norms\n"
        "  lora-probe inspect ckpt/ --module layers.5.self_attn.q_proj\n"
        "  lora-probe inspect ckpt/ --format json | jq '.modules | length'",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--norms", action="store_true", help="read the values: ‖s·B·A‖ and effective rank of each module"
    )
    parser.add_argument(
        "--module", metavar="NAME", help="one module with its values; NAME is its path or an unambiguous end of it"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=".",
        metavar="CKPT",
        help="an adapter folder, or a training output folder (its last checkpoint is taken); default: .",
    )


def _add_check(commands: Any) -> None:
    parser = _command(
        commands,
        "check",
        "say what is wrong with adapters, before any engine runs",
        "  lora-probe check ckpt/\n"
        "  lora-probe check ckpt/ --model base/ --max-lora-rank 64 --vllm-version 0.32\n"
        "  lora-probe check runs/ --recursive --select LP2,LP301 --strict\n"
        "  lora-probe check ckpt/ --format json | jq '.ledger.vllm.took_effect'\n"
        "  lora-probe check adapters/ --recursive --format sarif > lora-probe.sarif\n"
        "  lora-probe check ckpt/ --model base/ --fix -o fixed/",
        ("text", "json", "sarif", "github"),
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        help="adapter folders, training output folders, or files in adapter folders; default: .",
    )
    parser.add_argument("--recursive", action="store_true", help="every adapter in the trees below the folders")
    parser.add_argument("--model", metavar="BASE", help="base model, a folder or an id; default: each adapter's own")
    rules = parser.add_argument_group("rules", "by code, prefix (LP2, LP2xx) or name; `lora-probe rule` lists them")
    rules.add_argument("--select", action="extend", type=_codes, metavar="CODES", help="only these, as LP2,LP301")
    rules.add_argument("--ignore", action="extend", type=_codes, metavar="CODES", help="all but these")
    rules.add_argument("--strict", action="store_true", help="fail on warnings and on rules that could not be run, too")
    rules.add_argument("--exit-zero", action="store_true", help="status 0 whatever is found (2 stays 2)")
    parser.add_argument("--vllm-version", metavar="X", help="predict for this vLLM; default: the one installed")
    mending = parser.add_argument_group("mending", "names of tensors, and .bin to safetensors; no value is touched")
    mending.add_argument("--fix", action="store_true", help="write the mended adapter to -o, and check that")
    mending.add_argument("-o", "--output", metavar="FIXED", help="a new folder")
    mending.add_argument("--diff", action="store_true", help="show what --fix would rename, and write nothing")
    _add_engine(parser, "as the engine is started", running=False)


def _codes(word: str) -> list[str]:
    codes = [code.strip() for code in word.split(",") if code.strip()]
    if not codes:
        raise argparse.ArgumentTypeError("names no rule: a code, a prefix as LP2, or a name is")
    return codes


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


def _add_engine(parser: argparse.ArgumentParser, dtype: str, *, running: bool = True) -> None:
    more = "; any other vLLM flag goes after --" if running else ""
    engine = parser.add_argument_group("engine", f"spelled as vLLM spells them{more}")
    engine.add_argument("--dtype", choices=DTYPES, help=dtype)
    engine.add_argument("--lora-dtype", choices=DTYPES)
    own = "vLLM's own, 16" if running else "enough for the adapter; vLLM's own is 16"
    engine.add_argument("--max-lora-rank", type=int, metavar="R", help=f"default: {own}")
    engine.add_argument("--max-loras", type=int, metavar="N")
    if running:
        engine.add_argument(
            "--max-model-len", type=int, metavar="N", help="default: 4096, or less if the base has less"
        )
    engine.add_argument("--tensor-parallel-size", type=int, metavar="N")
    engine.add_argument("--lora-target-modules", nargs="+", metavar="NAME", help="takes all that follows: CKPT first")


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
    parser = _command(
        commands,
        "rule",
        "explain a rule",
        "  lora-probe rule\n  lora-probe rule LP201\n  lora-probe rule LP2xx --all\n"
        "  lora-probe rule --all --format markdown > RULES.md",
        ("text", "json", "markdown"),
        reads=False,
    )
    parser.add_argument(
        "code", nargs="?", metavar="CODE", help="a rule by code or name, or a family as LP7xx; default: every rule"
    )
    parser.add_argument("--all", action="store_true", help="the page of every rule, not a line each")


def _add_env(commands: Any) -> None:
    _command(commands, "env", "the versions block for a bug report", "  lora-probe env", reads=False)


def refuse_ignored(options: argparse.Namespace) -> None:
    """Options of `parity` for runs that do not take place: whoever gave them believes something that is not so.

    Raises:
        ProbeError: there are some.
    """
    if not options.weights_only:
        return
    given = ["--engine"] if options.engine is not None else []
    given += [f"--{name.replace('_', '-')}" for name in ("prompt", "prompt_file", "chat") if getattr(options, name)]
    given += ["--dtype"] if options.dtype and options.merged else []
    given += ["flags after --"] if options.engine_args else []
    if given:
        hint = "leave them out, or leave out --weights-only"
        raise ProbeError(f"{', '.join(given)}: nothing is run with --weights-only", hint)


def refuse_unmendable(options: argparse.Namespace) -> None:
    """Options of `check` that do not go with mending.

    Raises:
        ProbeError: there are some.
    """
    if options.fix == options.diff or bool(options.output) != options.fix:
        raise ProbeError("--fix writes to the folder after -o, --diff writes nothing", "give --fix -o FIXED, or --diff")
    if options.format not in ("text", "json"):
        raise ProbeError(
            f"--fix and --diff have no --format {options.format}: text and json go",
            f"to have {options.format}, check the mended folder by itself",
        )


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """What is said about the engine, by the names that vLLM's Python interface has for it."""
    return {name: getattr(options, name) for name in ENGINE_OPTIONS if hasattr(options, name)}


def prompts(options: argparse.Namespace) -> list[str]:
    """What is to be asked: the prompts that were given, then those of the file."""
    return [*(options.prompt or []), *(_prompts_in(options.prompt_file) if options.prompt_file else [])]


def _prompts_in(path: str) -> list[str]:
    """The prompts of a file, one a line; `-` is standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"cannot read the prompts in `{path}`: {error}") from error
    found = [line for line in text.splitlines() if line.strip()]
    if not found:
        raise ProbeError(f"`{path}` holds no prompt", "write one prompt on each line")
    return found


def same_with_another_engine(options: argparse.Namespace) -> str:
    """The command that was given, for the engine to compare with."""
    other = {"peft": "vllm", "vllm": "peft"}.get(options.engine, "peft")
    words: list[str] = []
    skip = False
    for word, before in zip(options.given, ["", *options.given], strict=False):
        if skip or word in ("-o", "--output", "--force"):
            skip = word in ("-o", "--output")
            continue
        words.append(other if before == "--engine" else word.replace(f"--engine={options.engine}", f"--engine={other}"))
    return shlex.join(["lora-probe", *words, "-o", "OTHER.lptrace"])
