"""The command line: `lora-probe`. In: arguments. Out: text or JSON on standard output, hints and progress on standard
error, and the exit status: 0 judged and nothing wrong, 1 something found or undecided, 2 nothing could be judged.

Everything heavy is imported by the command that needs it. What reads files that others wrote runs in a process of its
own, within the limits that `--timeout` and `--max-memory` set (`guarded.py`).
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_probe.cli.budget import budget
from lora_probe.cli.check import check
from lora_probe.cli.ending import CLEAN, FOUND, UNJUDGED, supervised
from lora_probe.cli.options import engine_options, parser_of_all, prompts, refuse_ignored, same_with_another_engine
from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.render.console import as_json, dump, hint, say, show, write
from lora_probe.render.progress import comparing, following, telling, working

if TYPE_CHECKING:
    from lora_probe.recording import Trace


WITH_FLAGS = ("trace", "parity")
"""Commands that take flags of an engine after `--`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command in a process of its own, and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return supervised(lambda: run(arguments))


def run(arguments: list[str]) -> int:
    """Run one command in this process. Raises ProbeError, and SystemExit after `--help`."""
    own, flags = _split(arguments)
    options = argparse.Namespace()
    parser_of_all().parse_args(own, options)
    options.engine_args, options.given = flags, own
    if options.command not in ("rule", "env"):
        limits.allow(budget(options), _left(options))
    if options.command == "parity":
        refuse_ignored(options)
    return COMMANDS[options.command](options)


def _left(options: argparse.Namespace) -> str:
    """What an interrupted command leaves behind."""
    if options.command == "trace":
        return "the recording is incomplete; nothing is left running"
    if options.command == "parity":
        kept = options.output
        return "nothing is left running" + (f"; `{kept}` is half filled, --force overwrites it" if kept else "")
    return ""


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the engine's after the first `--`. For other commands, paths stand behind it: one that
    begins with a dash is no option there."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    own, rest = arguments[:at], arguments[at + 1 :]
    if own and own[0] in WITH_FLAGS:
        return own, rest
    return [*own, *(f"./{word}" if word.startswith("-") else word for word in rest)], []


def _inspect(options: argparse.Namespace) -> int:
    from lora_probe.adapter import open_adapter
    from lora_probe.render import json as machine
    from lora_probe.render.text import terminal

    limits.begin(Path(options.checkpoint))
    adapter = open_adapter(options.checkpoint)
    if options.module is not None:
        return _inspect_module(adapter, options)
    spectra = None
    if options.norms:
        with working(f"reading {terminal.size(adapter.weights.size)} of values", len(adapter.modules)) as tick:
            spectra = spectra_of(adapter, tick)
    if options.format == "json":
        dump(machine.inspect_json(adapter, spectra))
        return CLEAN
    show(terminal.adapter(adapter))
    if spectra is not None:
        show("")
        show(terminal.norms(adapter, spectra))
    else:
        hint(f"lora-probe inspect {adapter.path} --norms")
    return CLEAN


def _inspect_module(adapter: Any, options: argparse.Namespace) -> int:
    from lora_probe.adapter.one_module import select
    from lora_probe.render.text import one_module as module

    found = select(adapter, options.module)
    if options.format == "json":
        dump(module.module_json(found))
    else:
        show(module.module(found))
    return CLEAN


def spectra_of(adapter: Any, tick: Callable[[], None]) -> dict[str, Any]:
    """The spectrum of every module by its name in the file; None where A and B are no pair."""
    from lora_probe.adapter.spectrum import pair_spectrum

    found = {}
    for module in adapter.modules:
        found[module.stored_as] = pair_spectrum(adapter, module)
        tick()
    return found


def _trace(options: argparse.Namespace) -> int:
    from lora_probe.engines.launch import LOG, trace

    with telling(f"{options.engine}: starting") as tell:
        found = trace(
            options.checkpoint,
            engine=options.engine,
            model=options.model,
            prompts=prompts(options),
            chat=options.chat,
            max_tokens=options.max_tokens,
            follow=options.follow,
            keep=options.keep,
            out=options.output,
            force=options.force,
            options=engine_options(options),
            engine_args=options.engine_args,
            progress=following(options.engine, tell),
        )
    status = _present(found, options)
    say(f"wrote {found.path}, the engine's log is {found.path / LOG}")
    hint(same_with_another_engine(options))
    hint(shlex.join(["lora-probe", "compare", str(found.path), "OTHER.lptrace"]))
    return status


def _present(trace: Trace, options: argparse.Namespace) -> int:
    """Show a trace and turn its ledgers into an exit status."""
    from lora_probe.render import json as machine
    from lora_probe.render.text import terminal

    if options.format == "json":
        dump(machine.trace_json(trace))
    else:
        show(terminal.run(trace, story=options.events))
    if not trace.loads:
        return UNJUDGED
    return CLEAN if trace.complete and all(ledger.healthy for _, ledger in trace.loads) else FOUND


def _show_trace(options: argparse.Namespace) -> int:
    from lora_probe.recording import open_trace

    limits.begin(Path(options.trace))
    return _present(open_trace(options.trace), options)


def _compare(options: argparse.Namespace) -> int:
    from lora_probe.comparison import compare
    from lora_probe.recording import open_trace
    from lora_probe.render import json as machine
    from lora_probe.render.text import terminal

    limits.begin(Path(options.reference), Path(options.candidate))
    found = compare(open_trace(options.reference), open_trace(options.candidate), options.rtol)
    if options.format == "json":
        dump(machine.comparison_json(found))
    else:
        show(terminal.comparison(found))
    return CLEAN if found.verdict == "agree" else FOUND


def _parity(options: argparse.Namespace) -> int:
    # One thread for each product: the tensors themselves are spread over the processors.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lora_probe.merging.parity import REPORT, parity
    from lora_probe.render import json as machine
    from lora_probe.render.text import parity as merged

    kept = options.output
    with telling("looking at the files") as tell:
        found = parity(
            options.checkpoint,
            model=options.model,
            merged=options.merged,
            engine=options.engine or "peft",
            weights_only=options.weights_only,
            prompts=prompts(options),
            chat=options.chat,
            max_tokens=options.max_tokens,
            out=options.output,
            force=options.force,
            options=engine_options(options),
            engine_args=options.engine_args,
            weights_progress=comparing(tell),
            engine_progress=lambda name, now: following(name, tell)(now),
        )
    data = machine.parity_json(found)
    if options.format == "json":
        dump(data)
    else:
        show(merged.parity(found))
    if kept:
        (Path(kept) / REPORT).write_text(as_json(data), encoding="utf-8")
        names = ", ".join(sorted(path.name for path in Path(kept).iterdir()))
        say(f"kept in {kept}: {names}")
    if options.weights_only and found.verdict != "differs":
        again = shlex.join(["lora-probe", *(word for word in options.given if word != "--weights-only")])
        hint(f"to compare the outputs as well: {again}")
    return CLEAN if found.verdict == "verified" else FOUND


def _rule(options: argparse.Namespace) -> int:
    from lora_probe.render import json as machine
    from lora_probe.render import markdown as pages
    from lora_probe.render.text import rule as ruled
    from lora_probe.rules import all_rules
    from lora_probe.rules.codes import meant

    known = all_rules()
    if options.code is None:
        chosen = list(known.values())
    else:
        chosen = [known[code] for code in meant(options.code, known)]
        if not chosen:
            raise ProbeError(f"there is no rule `{options.code}`", f"rules: {', '.join(known)}")
    if options.format == "json":
        dump(machine.rules_json(chosen))
    elif options.format == "markdown":
        write([pages.markdown(chosen)])
    else:
        show(ruled.pages(chosen) if options.all or len(chosen) == 1 else ruled.rules(chosen))
    return CLEAN


def _env(options: argparse.Namespace) -> int:
    from lora_probe.engines.launch import versions
    from lora_probe.render import json as machine
    from lora_probe.render.text import terminal

    found = versions()
    if options.format == "json":
        dump({"schema_version": machine.SCHEMA_VERSION, "versions": found})
    else:
        show(terminal.versions(found))
    return CLEAN


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "check": check,
    "trace": _trace,
    "show": _show_trace,
    "compare": _compare,
    "parity": _parity,
    "rule": _rule,
    "env": _env,
}
