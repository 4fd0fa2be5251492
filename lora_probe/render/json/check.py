"""JSON of `check`: one adapter as one object, several as a list of the same objects with a summary.

In: reports. Out: plain dictionaries, and lines of JSON. Fields may be added, none is removed.

One adapter:

    {"schema_version": 1, "adapter": path, "model": base or null, "vllm_version": "0.32" or null, "notes": [...],
     "ledger": {"peft": {"refused", "message", "total", "took_effect", "wrong", "lost", "unknown", "modules"}, ...},
     "diagnostics": [{"code", "name", "severity", "message", "hint", "modules", "engines", "path", "line"}],
     "not_run": [{"codes": [...], "why": ...}], "ignored": number of findings of rules that were not selected,
     "not_served": {engine that the adapter is not judged for: why}}

With `--fix`, the report is about the adapter that was written (or, if there was nothing to fix, the one that was read)
and also has:

     "mended": {"folder": path or null, "renamed": {old: new}, "left": {name: why}, "converted": true or false,
                "not_copied": [file, ...]}

Several adapters, or with `--recursive`:

    {"schema_version": 1, "reports": [...], "not_judged": [{"path", "message", "hint"}],
     "summary": {"adapters", "clean", "with_errors", "with_warnings", "with_rules_not_run", "not_judged",
                 "errors", "warnings", "infos", "codes": {"LP201": number of adapters}}}

If any were not judged (status 2), there is also an `error` (see `error.py`), with the message and the hint of the
first. If the only one was not judged, `error` is all there is.

`clean` adapters have no findings (from the rules that were run: see `with_rules_not_run`). Those `with_warnings` have
warnings and no errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from textwrap import indent
from typing import Any

from lora_probe.checking import Report
from lora_probe.checking.folders import NotJudged
from lora_probe.ledger import as_json as ledger_json
from lora_probe.render.console import as_json
from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.json.error import error_json, message_json
from lora_probe.render.json.fix import fix_json
from lora_probe.render.results import CheckResult, CheckRun, Paged
from lora_probe.rules import as_json as diagnostic_json


def report_json(report: Report) -> dict[str, Any]:
    """One adapter."""
    return {
        "schema_version": SCHEMA_VERSION,
        "adapter": str(report.adapter),
        "model": report.model,
        "vllm_version": report.vllm or None,
        "notes": list(report.notes),
        "ledger": {engine: ledger_json(ledger) for engine, ledger in report.ledgers.items()},
        "diagnostics": [diagnostic_json(diagnostic) for diagnostic in report.diagnostics],
        "not_run": [{"codes": list(skipped.codes), "why": skipped.why} for skipped in report.not_run],
        "ignored": report.ignored,
        "not_served": dict(report.not_served),
    }


def _page(report: Report, run: CheckRun) -> str:
    fixed = {} if run.fixed is None else {"mended": fix_json(run.fixed)}
    return as_json(report_json(report) | fixed)


def _whole(result: CheckResult) -> Iterable[str]:
    if result.run.single and result.reports:
        return result.pages
    if result.run.single and result.not_judged:
        return [as_json(error_json(result.not_judged[0].error))]
    return _several(result.pages, result.reports, result.not_judged)


CHECK = Paged(_page, _whole)


def _several(pages: Iterable[str], reports: Sequence[Report], not_judged: Sequence[NotJudged]) -> Iterator[str]:
    """Several adapters. `pages` are the texts of `reports`, which are written as they come from the disk."""
    head, key, tail = as_json(_frame(reports, not_judged)).partition('"reports": []')
    if not reports:
        yield head + key + tail
        return
    yield f'{head}"reports": ['
    before = None
    for text in pages:
        if before is not None:
            yield f"{before},"
        before = indent(text, "    ")
    yield f"{before}\n  ]{tail}"


def _frame(reports: Sequence[Report], not_judged: Sequence[NotJudged]) -> dict[str, Any]:
    """The object around the reports."""
    codes = Counter(code for report in reports for code in {diagnostic.code for diagnostic in report.diagnostics})
    return {
        "schema_version": SCHEMA_VERSION,
        "reports": [],
        "not_judged": [{"path": str(lost.path), **message_json(lost.error)} for lost in not_judged],
        "summary": {
            "adapters": len(reports),
            "clean": sum(not report.diagnostics for report in reports),
            "with_errors": sum(not report.clean for report in reports),
            "with_warnings": sum(report.clean and report.count("warning") > 0 for report in reports),
            "with_rules_not_run": sum(any(skipped.codes for skipped in report.not_run) for report in reports),
            "not_judged": len(not_judged),
            "errors": sum(report.count("error") for report in reports),
            "warnings": sum(report.count("warning") for report in reports),
            "infos": sum(report.count("info") for report in reports),
            "codes": dict(sorted(codes.items())),
        },
        **({"error": message_json(not_judged[0].error)} if not_judged else {}),
    }
