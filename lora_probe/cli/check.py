"""`lora-probe check`: adapters judged, or their names mended.

In: options. Out: reports on standard output, and the exit status.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_probe.checking.folders import NotJudged, requested
from lora_probe.cli.budget import budget
from lora_probe.cli.ending import CLEAN, FOUND, UNJUDGED
from lora_probe.cli.options import engine_options, refuse_unmendable
from lora_probe.errors import ProbeError
from lora_probe.render.console import as_json, complain, dump, hint, say, show, write
from lora_probe.render.progress import telling
from lora_probe.render.spool import Spool

if TYPE_CHECKING:
    from lora_probe.checking import Report


def mends(options: argparse.Namespace) -> bool:
    """Whether names are to be mended, or shown as they would be."""
    return bool(options.fix or options.diff or options.output)


def check(options: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    return _mend(options) if mends(options) else _judge(options)


def _judge(options: argparse.Namespace, mended: dict[str, Any] | None = None) -> int:
    """Check what is asked for. `mended` is what was done before, for the JSON."""
    from lora_probe.checking.check import check_all
    from lora_probe.checking.judging import Page, judged
    from lora_probe.render import check_json as report
    from lora_probe.render.text import check as checked

    wanted = requested(options.checkpoints or ["."], options.recursive)
    if options.recursive and wanted.folders:
        say(f"{len(wanted.folders)} adapters below {', '.join(options.checkpoints) or '.'}")
    full = len(wanted.folders) <= checked.FULL
    more = {"mended": mended} if mended is not None else {}
    page: Page | None = {
        "text": checked.report if full else checked.details,
        "json": lambda one: as_json(report.report_json(one) | more),
    }.get(options.format)
    judge = partial(
        check_all,
        model=options.model,
        options=engine_options(options),
        vllm_version=options.vllm_version,
        select=options.select or [],
        ignore=options.ignore or [],
    )
    found: list[Report] = []
    pages: list[Any] | Spool = Spool() if options.format == "json" else []
    lost = list(wanted.not_judged)
    with telling("reading") as tell:

        def passing(text: str) -> None:
            tell(text if wanted.single else f"{len(found) + 1} of {len(wanted.folders)}: {text}", passing=True)

        for outcome in judged(wanted.folders, judge, page, budget(options), passing):
            if isinstance(outcome, NotJudged):
                lost.append(outcome)
            else:
                found.append(outcome.report)
                pages.append(outcome.page)
    for path in wanted.skipped:
        say(f"{path} is not next to an adapter; skipped")
    if found or (wanted.skipped and not lost and options.format != "text"):
        _report(found, pages, lost, options.format, single=wanted.single, full=full)
    if options.format == "text" and (command := checked.next_command(found, options.model, mended is not None)):
        hint(command)
    for missing in lost:
        complain(missing.error.message, missing.error.hint)
    return _status(found, lost, options)


def _mend(options: argparse.Namespace) -> int:
    """`--diff`: what would be renamed. `--fix`: write it, and check what was written."""
    from lora_probe.checking.check import fix_for
    from lora_probe.checking.renaming import write as write_fix
    from lora_probe.render.text import fix as mended

    refuse_unmendable(options)
    wanted = requested(options.checkpoints or ["."], options.recursive)
    for missing in wanted.not_judged:
        raise missing.error
    if len(wanted.folders) != 1:
        raise ProbeError(f"{len(wanted.folders)} adapters: --fix and --diff take one", "name one folder")
    with telling("reading") as tell:
        found = fix_for(wanted.folders[0], options.model, lambda text: tell(text, passing=True))
    if options.diff:
        if options.format == "json":
            dump(mended.mending_json(found))
        else:
            show(mended.diff(found))
        return CLEAN
    skipped = write_fix(found, Path(options.output)) if found.needed else []
    say(mended.story(found, options.output, skipped))
    options.checkpoints = [options.output if found.needed else str(found.adapter.path)]
    options.recursive = False
    return _judge(options, mended.mended_json(found, options.output, skipped))


def _report(
    found: list[Report], pages: list[Any] | Spool, lost: list[NotJudged], form: str, *, single: bool, full: bool
) -> None:
    """Print what was found. `pages` is what the format makes of each adapter by itself, if anything."""
    from lora_probe.render import check_json as report
    from lora_probe.render import github, sarif
    from lora_probe.render.text import check as checked

    if form == "json":
        write(pages if single else report.reports_text(pages, found, lost))
    elif form == "sarif":
        dump(sarif.sarif(found, lost))
    elif form == "github":
        write(github.commands(found, lost))
    else:
        each = list(pages)
        show(checked.full(each, found, len(lost)) if full else checked.compact(each, found, len(lost)))


def _status(found: list[Report], lost: list[NotJudged], options: argparse.Namespace) -> int:
    """What `check` returns: 2 if a folder could not be judged, else 1 for errors; with --strict for less, too."""
    if lost:
        return UNJUDGED
    bad = any(
        not one.clean or (options.strict and (one.count("warning") or any(r.codes for r in one.not_run)))
        for one in found
    )
    return FOUND if bad and not options.exit_zero else CLEAN
