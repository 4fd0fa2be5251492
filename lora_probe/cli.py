"""The command line: `lora-probe`. In: arguments. Out: text or JSON on standard output, hints and progress on standard
error, and the exit status: 0 judged and nothing wrong, 1 something found or undecided, 2 nothing could be judged.

Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.text import Text

from lora_probe.errors import ProbeError
from lora_probe.options import parser_of_all
from lora_probe.render.progress import comparing, escaped, following, telling, working

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_probe.reading import Trace

CLEAN, FOUND, UNJUDGED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as systemd and `timeout` send it: what is running and what is half written goes, as after Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, flags = _split(arguments)
    options = argparse.Namespace()
    with _terminable():
        return _run(own, flags, options)


def _run(own: list[str], flags: list[str], options: argparse.Namespace) -> int:
    try:
        parser = parser_of_all()
        parser.parse_args(own, options)
        if flags and options.command not in ("trace", "parity"):
            parser.error("only `trace` and `parity` take engine flags after `--`")
        options.engine_args, options.given = flags, own
        return COMMANDS[options.command](options)
    except ProbeError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt as stop:
        _complain("interrupted", getattr(options, "interrupted", ""))
        return TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the engine's after the first `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _complain(message: str, hint: str = "") -> None:
    console = Console(stderr=True)
    console.print(f"[bold red]error:[/] {escaped(message)}", soft_wrap=True, highlight=False)
    for line in filter(None, hint.split("\n")):
        console.print(f"[cyan]hint:[/] {escaped(line)}", soft_wrap=True, highlight=False)


def _hint(text: str) -> None:
    Console(stderr=True).print(f"[cyan]hint:[/] {escaped(text)}", soft_wrap=True, highlight=False)


class _Output(Console):
    """Standard output. That its reader has gone (`| head`) changes no exit status; rich by itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        _reader_gone()


def _reader_gone() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show(renderable: Any) -> None:
    """Print for a person. Sentences are never broken (a terminal wraps them itself), tables fit their width."""
    console = _Output(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    waiting = [renderable]
    while waiting:
        part = waiting.pop(0)
        if isinstance(part, Group):
            waiting[:0] = part.renderables
        else:
            console.print(part, soft_wrap=isinstance(part, Text))


def _dump(data: dict[str, Any]) -> None:
    try:
        print(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False), flush=True)
    except BrokenPipeError:
        _reader_gone()


def _inspect(options: argparse.Namespace) -> int:
    from lora_probe.adapter import open_adapter
    from lora_probe.render import machine, terminal

    adapter = open_adapter(options.checkpoint)
    spectra = None
    if options.norms:
        with working(f"reading {terminal.size(adapter.weights.size)} of values", len(adapter.modules)) as tick:
            spectra = spectra_of(adapter, tick)
    if options.format == "json":
        _dump(machine.inspect_json(adapter, spectra))
        return CLEAN
    _show(terminal.adapter(adapter))
    if spectra is not None:
        _show("")
        _show(terminal.norms(adapter, spectra))
    else:
        _hint(f"lora-probe inspect {adapter.path} --norms")
    return CLEAN


def spectra_of(adapter: Any, tick: Callable[[], None]) -> dict[str, Any]:
    """The spectrum of every module by its name in the file; None where A and B are no pair."""
    from lora_probe.expected import pair_spectrum

    found = {}
    for module in adapter.modules:
        found[module.stored_as] = pair_spectrum(adapter, module)
        tick()
    return found


def _trace(options: argparse.Namespace) -> int:
    from lora_probe.engines.launch import LOG, trace

    options.interrupted = "the recording is incomplete; nothing is left running"
    with telling(f"{options.engine}: starting") as tell:
        found = trace(
            options.checkpoint,
            engine=options.engine,
            model=options.model,
            prompts=_prompts(options),
            chat=options.chat,
            max_tokens=options.max_tokens,
            follow=options.follow,
            keep=options.keep,
            out=options.output,
            force=options.force,
            options=_engine_options(options),
            engine_args=options.engine_args,
            progress=following(options.engine, tell),
        )
    status = _present(found, options)
    console = Console(stderr=True)
    console.print(f"wrote {found.path}, the engine's log is {found.path / LOG}", soft_wrap=True, highlight=False)
    _hint(_same_with_another_engine(options))
    _hint(shlex.join(["lora-probe", "compare", str(found.path), "OTHER.lptrace"]))
    return status


def _same_with_another_engine(options: argparse.Namespace) -> str:
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


ENGINE_OPTIONS = (
    "dtype",
    "lora_dtype",
    "max_lora_rank",
    "max_loras",
    "max_model_len",
    "tensor_parallel_size",
    "lora_target_modules",
)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ENGINE_OPTIONS}


def _prompts(options: argparse.Namespace) -> list[str]:
    return [*(options.prompt or []), *(_prompts_in(options.prompt_file) if options.prompt_file else [])]


def _prompts_in(path: str) -> list[str]:
    """The prompts of a file, one a line; `-` is standard input."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"cannot read the prompts in `{path}`: {error}") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ProbeError(f"`{path}` holds no prompt", "write one prompt on each line")
    return prompts


def _present(trace: Trace, options: argparse.Namespace) -> int:
    """Show a trace and turn its ledgers into an exit status."""
    from lora_probe.render import machine, terminal

    if options.format == "json":
        _dump(machine.trace_json(trace))
    else:
        _show(terminal.run(trace, story=options.events))
    if not trace.loads:
        return UNJUDGED
    return CLEAN if trace.complete and all(ledger.healthy for _, ledger in trace.loads) else FOUND


def _show_trace(options: argparse.Namespace) -> int:
    from lora_probe.reading import open_trace

    return _present(open_trace(options.trace), options)


def _compare(options: argparse.Namespace) -> int:
    from lora_probe.comparison import compare
    from lora_probe.reading import open_trace
    from lora_probe.render import machine, terminal

    found = compare(open_trace(options.reference), open_trace(options.candidate), options.rtol)
    if options.format == "json":
        _dump(machine.comparison_json(found))
    else:
        _show(terminal.comparison(found))
    return CLEAN if found.verdict == "agree" else FOUND


def _parity(options: argparse.Namespace) -> int:
    # One thread for each product: the tensors themselves are spread over the processors.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lora_probe.preserved import REPORT, parity
    from lora_probe.render import machine, merged

    _refuse_ignored(options)
    kept = options.output
    options.interrupted = "nothing is left running" + (
        f"; `{kept}` is half filled, --force overwrites it" if kept else ""
    )
    with telling("looking at the files") as tell:
        found = parity(
            options.checkpoint,
            model=options.model,
            merged=options.merged,
            engine=options.engine or "peft",
            weights_only=options.weights_only,
            prompts=_prompts(options),
            chat=options.chat,
            max_tokens=options.max_tokens,
            out=options.output,
            force=options.force,
            options=_engine_options(options),
            engine_args=options.engine_args,
            weights_progress=comparing(tell),
            engine_progress=lambda name, now: following(name, tell)(now),
        )
    data = machine.parity_json(found)
    if options.format == "json":
        _dump(data)
    else:
        _show(merged.parity(found))
    if kept:
        (Path(kept) / REPORT).write_text(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False))
        names = ", ".join(sorted(path.name for path in Path(kept).iterdir()))
        Console(stderr=True).print(f"kept in {kept}: {names}", soft_wrap=True, highlight=False)
    if options.weights_only and found.verdict != "differs":
        again = shlex.join(["lora-probe", *(word for word in options.given if word != "--weights-only")])
        _hint(f"to compare the outputs as well: {again}")
    return CLEAN if found.verdict == "verified" else FOUND


def _refuse_ignored(options: argparse.Namespace) -> None:
    """Options of runs that do not take place: whoever gave them believes something that is not so."""
    if not options.weights_only:
        return
    given = ["--engine"] if options.engine is not None else []
    given += [f"--{name.replace('_', '-')}" for name in ("prompt", "prompt_file", "chat") if getattr(options, name)]
    given += ["--dtype"] if options.dtype and options.merged else []
    given += ["flags after --"] if options.engine_args else []
    if given:
        hint = "leave them out, or leave out --weights-only"
        raise ProbeError(f"{', '.join(given)}: nothing is run with --weights-only", hint)


def _rule(options: argparse.Namespace) -> int:
    from lora_probe.render import machine, terminal
    from lora_probe.rules import all_rules

    known = all_rules()
    if options.code is None:
        chosen = list(known.values())
    else:
        # `LP7` or `LP7xx` is the family.
        wanted = options.code.upper().rstrip("X")
        chosen = [
            rule for code, rule in known.items() if code == wanted or (len(wanted) > 2 and code.startswith(wanted))
        ]
        if not chosen:
            raise ProbeError(f"there is no rule `{options.code}`", f"rules: {', '.join(known)}")
    if options.format == "json":
        _dump(machine.rules_json(chosen))
    else:
        _show(terminal.rule(chosen[0]) if len(chosen) == 1 else terminal.rules(chosen))
    return CLEAN


def _env(options: argparse.Namespace) -> int:
    from lora_probe.engines.launch import versions
    from lora_probe.render import machine, terminal

    found = versions()
    if options.format == "json":
        _dump({"schema_version": machine.SCHEMA_VERSION, "versions": found})
    else:
        _show(terminal.versions(found))
    return CLEAN


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "trace": _trace,
    "show": _show_trace,
    "compare": _compare,
    "parity": _parity,
    "rule": _rule,
    "env": _env,
}


if __name__ == "__main__":
    sys.exit(main())
