"""`lora-probe check`: problems of adapters, and the fix for tensor names.

In: options. Out: reports on standard output, and the exit status.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN, FOUND, UNJUDGED
from lora_probe.cli.options import Command, add_engine, add_limits, apply_limits, budget, engine_options
from lora_probe.errors import ProbeError
from lora_probe.files.threads import one_blas_thread
from lora_probe.render.console import complain, hint, note, remarks
from lora_probe.render.formats import DEFAULT, ERRORS, present, renderer
from lora_probe.render.progress import status_line
from lora_probe.render.results import CheckResult, CheckRun, FixResult, Paged
from lora_probe.render.spool import Spool

if TYPE_CHECKING:
    from lora_probe.checking import Report
    from lora_probe.checking.folders import NotJudged, Requested
    from lora_probe.checking.judging import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        help="adapter folders, training output folders, files in adapter folders, or ids of adapters in the local "
        "Hugging Face cache; default: .",
    )
    parser.add_argument("--recursive", action="store_true", help="check every adapter in and below the folders")
    parser.add_argument("--model", metavar="BASE", help="base model: a folder or an id; default: each adapter's own")
    parser.add_argument(
        "--engine",
        action="extend",
        type=_engines,
        metavar="ENGINES",
        help="judge for these, separated by commas: peft,vllm; default: all that serve the adapter's model",
    )
    parser.add_argument("--vllm-version", metavar="X", help="predict for this vLLM version; default: the installed one")
    rules = parser.add_argument_group("rules", "by code, prefix (LP2, LP2xx) or name; `lora-probe rule` lists them")
    rules.add_argument("--select", action="extend", type=_codes, metavar="CODES", help="run only these: LP2,LP301")
    rules.add_argument("--ignore", action="extend", type=_codes, metavar="CODES", help="run all but these")
    rules.add_argument(
        "--strict", action="store_true", help="also exit with 1 for warnings and for rules that could not be run"
    )
    rules.add_argument(
        "--exit-zero", action="store_true", help="exit with 0 whatever is found (2 still means not judged)"
    )
    fix = parser.add_argument_group("fix", "rename tensors, and convert .bin to safetensors; values stay the same")
    fix.add_argument("--fix", action="store_true", help="write a fixed adapter to -o, and check that")
    fix.add_argument("-o", "--output", metavar="FIXED", help="a new folder")
    fix.add_argument("--diff", action="store_true", help="print what --fix would rename, without writing anything")
    add_engine(parser, "dtype that the engine is started with", running=False)
    add_limits(parser)


def _engines(word: str) -> list[str]:
    return [name.strip() for name in word.split(",") if name.strip()]


def _codes(word: str) -> list[str]:
    codes = [code.strip() for code in word.split(",") if code.strip()]
    if not codes:
        raise argparse.ArgumentTypeError("expected a rule code (LP204), a prefix (LP2) or a rule name")
    return codes


def run(options: argparse.Namespace) -> int:
    from lora_probe.checking.folders import requested

    apply_limits(options)
    one_blas_thread()
    wanted = requested(options.checkpoints or ["."], options.recursive)
    if options.fix or options.diff or options.output:
        return _fix(wanted, options)
    if options.recursive and wanted.folders:
        note(f"{len(wanted.folders)} adapters below {', '.join(options.checkpoints) or '.'}")
    return _check(wanted, options)


def _check(wanted: Requested, options: argparse.Namespace, fixed: FixResult | None = None) -> int:
    """Check the adapters. `fixed` is what `--fix` has done before."""
    from lora_probe.checking.check import check_all
    from lora_probe.rules.vllm_versions import note_on

    check = partial(
        check_all,
        model=options.model,
        options=engine_options(options),
        vllm_version=options.vllm_version,
        select=options.select or [],
        ignore=options.ignore or [],
        engines=options.engine or [],
    )
    result = _read(wanted, check, options, fixed)
    if options.format == DEFAULT and wanted.single:
        remarks(text for report in result.reports for text in report.notes)
    # What is noted about one of several adapters would hide what is noted about all.
    if not wanted.single and (newer := note_on(options.vllm_version)) is not None:
        note(newer)
    for path in wanted.skipped:
        note(f"{path} is not next to an adapter; skipped")
    # Formats of other distributions expect reports.
    if result.reports or not result.not_judged or options.format in ERRORS:
        present(_view(fixed), options.format, result)
    if options.format == DEFAULT:
        from lora_probe.render.text.check import next_command

        if command := next_command(result, options.model):
            hint(command)
    hints = set()
    for lost in result.not_judged:
        complain(lost.error.message, "" if lost.error.hint in hints else lost.error.hint)
        hints.add(lost.error.hint)
    return _status(result, options)


def _view(fixed: FixResult | None) -> str:
    """The command as the formats know it."""
    return "check" if fixed is None else "check --fix"


def _read(wanted: Requested, check: Check, options: argparse.Namespace, fixed: FixResult | None) -> CheckResult:
    """Read all adapters, each in turn, in a process of their own, which makes the pages as well."""
    from lora_probe.checking.folders import NotJudged
    from lora_probe.checking.judging import judged

    checkrun = CheckRun(len(wanted.folders), wanted.single, fixed, options.verbose)
    chosen = renderer(_view(fixed), options.format)
    page = partial(_paged, chosen, checkrun) if isinstance(chosen, Paged) else None
    reports: list[Report] = []
    pages = Spool()
    not_judged: list[NotJudged] = list(wanted.not_judged)
    with status_line("reading") as report:

        def passing(text: str) -> None:
            report(text if wanted.single else f"{len(reports) + 1} of {len(wanted.folders)}: {text}", passing=True)

        for outcome in judged(wanted.folders, check, page, budget(options), passing):
            if isinstance(outcome, NotJudged):
                not_judged.append(outcome)
            else:
                reports.append(outcome.report)
                pages.append(outcome.page)
    return CheckResult(checkrun, reports, pages, not_judged)


def _paged(chosen: Paged, checkrun: CheckRun, report: Report) -> object:
    return chosen.page(report, checkrun)


def _fix(wanted: Requested, options: argparse.Namespace) -> int:
    """`--diff`: print what would be renamed. `--fix`: write it, and check what was written."""
    from lora_probe.checking.check import fix_for
    from lora_probe.checking.folders import requested
    from lora_probe.checking.renaming import write
    from lora_probe.render.text.fix import summary

    if options.fix == options.diff or bool(options.output) != options.fix:
        raise ProbeError("--fix needs -o FIXED, and --diff writes nothing", "pass --fix -o FIXED, or --diff")
    renderer("check --diff" if options.diff else "check --fix", options.format)
    for missing in wanted.not_judged:
        raise missing.error
    if len(wanted.folders) != 1:
        raise ProbeError(
            f"--fix and --diff accept one adapter, not {len(wanted.folders)}", "pass the folder of one adapter"
        )
    with status_line("reading") as report:
        fix = fix_for(wanted.folders[0], options.model, lambda text: report(text, passing=True))
    if options.diff:
        present("check --diff", options.format, fix)
        return CLEAN
    not_copied = write(fix, Path(options.output)) if fix.needed else []
    fixed = FixResult(fix, options.output, tuple(not_copied))
    note(summary(fixed))
    return _check(requested([options.output if fix.needed else str(fix.adapter.path)]), options, fixed)


def _status(result: CheckResult, options: argparse.Namespace) -> int:
    """2 if a folder could not be judged, else 1 for errors; with --strict also for warnings and rules not run."""
    if result.not_judged:
        return UNJUDGED
    failed = any(not report.clean or (options.strict and _not_strictly_clean(report)) for report in result.reports)
    return FOUND if failed and not options.exit_zero else CLEAN


def _not_strictly_clean(report: Report) -> bool:
    return report.count("warning") > 0 or any(skipped.codes for skipped in report.not_run)


COMMAND = Command(
    "check",
    "find problems in adapters, before an engine runs",
    "  lora-probe check ckpt/\n"
    "  lora-probe check ckpt/ --model base/ --max-lora-rank 64 --vllm-version 0.32\n"
    "  lora-probe check ckpt/ --engine peft\n"
    "  lora-probe check runs/ --recursive --select LP2,LP301 --strict\n"
    "  lora-probe check ckpt/ --format json | jq '.ledger.vllm.took_effect'\n"
    "  lora-probe check adapters/ --recursive --format sarif > lora-probe.sarif\n"
    "  lora-probe check ckpt/ --model base/ --fix -o fixed/",
    add_arguments,
    run,
)
