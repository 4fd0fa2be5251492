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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_probe.errors import ProbeError
from lora_probe.folders import Lost, asked, each
from lora_probe.options import (
    engine_options,
    parser_of_all,
    prompts,
    refuse_ignored,
    refuse_unmendable,
    same_with_another_engine,
)
from lora_probe.render.cells import one_line
from lora_probe.render.output import complain, dump, hint, say, show, write
from lora_probe.render.progress import comparing, following, telling, working

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_probe.checking import Report
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
        complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt as stop:
        complain("interrupted", getattr(options, "interrupted", ""))
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


def _inspect(options: argparse.Namespace) -> int:
    from lora_probe.adapter import open_adapter
    from lora_probe.render import machine, terminal

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
    from lora_probe.render import module
    from lora_probe.selected import select

    found = select(adapter, options.module)
    if options.format == "json":
        dump(module.module_json(found))
    else:
        show(module.module(found))
    return CLEAN


def spectra_of(adapter: Any, tick: Callable[[], None]) -> dict[str, Any]:
    """The spectrum of every module by its name in the file; None where A and B are no pair."""
    from lora_probe.expected import pair_spectrum

    found = {}
    for module in adapter.modules:
        found[module.stored_as] = pair_spectrum(adapter, module)
        tick()
    return found


def _check(options: argparse.Namespace) -> int:
    return _mend(options) if options.fix or options.diff or options.output else _judge(options)


def _judge(options: argparse.Namespace, mended: dict[str, Any] | None = None) -> int:
    """Check what is asked for. `mended` is what was done before, for the JSON."""
    from lora_probe.checking import check_all
    from lora_probe.render import checked, report

    wanted = asked(options.checkpoints or ["."], options.recursive)
    if options.recursive and wanted.folders:
        say(f"{len(wanted.folders)} adapters below {', '.join(options.checkpoints) or '.'}")
    full = len(wanted.folders) <= checked.FULL
    shown = {"text": checked.report if full else checked.details, "json": report.report_json}.get(options.format)
    found: list[Report] = []
    pages: list[Any] = []
    lost = list(wanted.lost)

    def counted(text: str) -> str:
        return f"{len(found) + 1} of {len(wanted.folders)}: {text}"

    with telling("reading") as tell:
        check = partial(
            check_all,
            model=options.model,
            options=engine_options(options),
            vllm_version=options.vllm_version,
            select=options.select or [],
            ignore=options.ignore or [],
            progress=lambda text: tell(one_line(text if wanted.single else counted(text)), passing=True),
        )
        for one in each(wanted.folders, lost, check):
            pages += [shown(one)] if shown else []
            # Of thousands of adapters the ledgers, a row for every module, are not kept.
            found.append(one if full else replace(one, ledgers={}))
    for path in wanted.passed:
        say(one_line(f"{path} lies beside no adapter: nothing to check"))
    if mended is not None:
        pages = [page | {"mended": mended} for page in pages] if options.format == "json" else pages
    if found or (wanted.passed and not lost and options.format != "text"):
        _report(found, pages, lost, options.format, single=wanted.single, full=full)
    if options.format == "text" and (command := checked.next_command(found, options.model, mended is not None)):
        hint(command)
    for missing in lost:
        complain(one_line(missing.error.message), one_line(missing.error.hint))
    return _status(found, lost, options)


def _mend(options: argparse.Namespace) -> int:
    """`--diff`: what would be renamed. `--fix`: write it, and check what was written."""
    from lora_probe.checking import mending_of
    from lora_probe.mending import write as write_mended
    from lora_probe.render import mended

    refuse_unmendable(options)
    wanted = asked(options.checkpoints or ["."], options.recursive)
    for missing in wanted.lost:
        raise missing.error
    if len(wanted.folders) != 1:
        raise ProbeError(f"{len(wanted.folders)} adapters: --fix and --diff take one", "name one folder")
    with telling("reading") as tell:
        found = mending_of(wanted.folders[0], options.model, lambda text: tell(one_line(text), passing=True))
    if options.diff:
        if options.format == "json":
            dump(mended.mending_json(found))
        else:
            show(mended.diff(found))
        return CLEAN
    skipped = write_mended(found, Path(options.output)) if found.needed else []
    say(mended.story(found, options.output, skipped))
    options.checkpoints = [options.output if found.needed else str(found.adapter.path)]
    options.recursive = False
    return _judge(options, mended.mended_json(found, options.output, skipped))


def _report(found: list[Report], pages: list[Any], lost: list[Lost], form: str, *, single: bool, full: bool) -> None:
    """Print what was found. `pages` is what the format makes of each adapter by itself, if anything."""
    from lora_probe.render import checked, github, report, sarif

    if form == "json":
        dump(pages[0] if single else report.reports_json(pages, found, lost))
    elif form == "sarif":
        dump(sarif.sarif(found, lost))
    elif form == "github":
        write(github.commands(found, lost))
    else:
        show(checked.full(pages, found, len(lost)) if full else checked.compact(pages, found, len(lost)))


def _status(found: list[Report], lost: list[Lost], options: argparse.Namespace) -> int:
    """What `check` returns: 2 if a folder could not be judged, else 1 for errors; with --strict for less, too."""
    if lost:
        return UNJUDGED
    bad = any(
        not one.clean or (options.strict and (one.count("warning") or any(r.codes for r in one.not_run)))
        for one in found
    )
    return FOUND if bad and not options.exit_zero else CLEAN


def _trace(options: argparse.Namespace) -> int:
    from lora_probe.engines.launch import LOG, trace

    options.interrupted = "the recording is incomplete; nothing is left running"
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
    from lora_probe.render import machine, terminal

    if options.format == "json":
        dump(machine.trace_json(trace))
    else:
        show(terminal.run(trace, story=options.events))
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
        dump(machine.comparison_json(found))
    else:
        show(terminal.comparison(found))
    return CLEAN if found.verdict == "agree" else FOUND


def _parity(options: argparse.Namespace) -> int:
    # One thread for each product: the tensors themselves are spread over the processors.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lora_probe.preserved import REPORT, parity
    from lora_probe.render import machine, merged

    refuse_ignored(options)
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
        (Path(kept) / REPORT).write_text(json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False))
        names = ", ".join(sorted(path.name for path in Path(kept).iterdir()))
        say(f"kept in {kept}: {names}")
    if options.weights_only and found.verdict != "differs":
        again = shlex.join(["lora-probe", *(word for word in options.given if word != "--weights-only")])
        hint(f"to compare the outputs as well: {again}")
    return CLEAN if found.verdict == "verified" else FOUND


def _rule(options: argparse.Namespace) -> int:
    from lora_probe.render import machine, pages, ruled
    from lora_probe.rules import all_rules

    known = all_rules()
    if options.code is None:
        chosen = list(known.values())
    else:
        # `LP7` or `LP7xx` is the family.
        wanted = options.code.upper().rstrip("X")
        chosen = [
            rule for code, rule in known.items() if code == wanted or (len(wanted) > 2 and code.startswith(wanted))
        ] or [rule for rule in known.values() if rule.name == options.code.lower()]
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
    from lora_probe.render import machine, terminal

    found = versions()
    if options.format == "json":
        dump({"schema_version": machine.SCHEMA_VERSION, "versions": found})
    else:
        show(terminal.versions(found))
    return CLEAN


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "inspect": _inspect,
    "check": _check,
    "trace": _trace,
    "show": _show_trace,
    "compare": _compare,
    "parity": _parity,
    "rule": _rule,
    "env": _env,
}


if __name__ == "__main__":
    sys.exit(main())
