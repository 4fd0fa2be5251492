"""JSON of `check`: one adapter as one object, several as a list of the same objects with a summary.

In: reports. Out: plain dictionaries. Fields may be added, none is taken away.

One adapter:

    {"schema_version": 1, "adapter": path, "model": base or null, "vllm_version": "0.32" or null, "notes": [...],
     "ledger": {"peft": {"refused", "message", "total", "took_effect", "wrong", "lost", "unknown", "modules"}, ...},
     "diagnostics": [{"code", "name", "severity", "message", "hint", "modules", "engines", "path", "line"}],
     "not_run": [{"codes": [...], "why": ...}], "ignored": number of findings of rules that were not asked for}

With `--fix` also, of the adapter that was written (or, where nothing was to mend, of the one that was read):

     "mended": {"folder": path or null, "renamed": {old: new}, "left": {name: why}, "converted": true or false,
                "not_copied": [file, ...]}

Several, or with `--recursive`:

    {"schema_version": 1, "reports": [...], "not_judged": [{"path", "message"}],
     "summary": {"adapters", "clean", "with_errors", "with_warnings", "with_rules_not_run", "not_judged",
                 "errors", "warnings", "infos", "codes": {"LP201": number of adapters}}}

`clean` adapters have no finding (of the rules that were run: see `with_rules_not_run`); those `with_warnings` have
warnings and no error.
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
from lora_probe.rules import as_json as diagnostic_json


def report_json(found: Report) -> dict[str, Any]:
    """One adapter."""
    return {
        "schema_version": SCHEMA_VERSION,
        "adapter": str(found.adapter),
        "model": found.model,
        "vllm_version": found.vllm or None,
        "notes": list(found.notes),
        "ledger": {engine: ledger_json(ledger) for engine, ledger in found.ledgers.items()},
        "diagnostics": [diagnostic_json(diagnostic) for diagnostic in found.diagnostics],
        "not_run": [{"codes": list(one.codes), "why": one.why} for one in found.not_run],
        "ignored": found.ignored,
    }


def reports_text(each: Iterable[str], found: Sequence[Report], lost: Sequence[NotJudged]) -> Iterator[str]:
    """Several adapters, as lines of JSON. `each` holds the text of every one of `found`."""
    head, key, tail = as_json(_frame(found, lost)).partition('"reports": []')
    if not found:
        yield head + key + tail
        return
    yield f'{head}"reports": ['
    before = None
    for text in each:
        if before is not None:
            yield f"{before},"
        before = indent(text, "    ")
    yield f"{before}\n  ]{tail}"


def _frame(found: Sequence[Report], lost: Sequence[NotJudged]) -> dict[str, Any]:
    """The object around the reports."""
    codes = Counter(code for report in found for code in {diagnostic.code for diagnostic in report.diagnostics})
    return {
        "schema_version": SCHEMA_VERSION,
        "reports": [],
        "not_judged": [{"path": str(one.path), "message": one.error.message} for one in lost],
        "summary": {
            "adapters": len(found),
            "clean": sum(not report.diagnostics for report in found),
            "with_errors": sum(not report.clean for report in found),
            "with_warnings": sum(report.clean and report.count("warning") > 0 for report in found),
            "with_rules_not_run": sum(any(one.codes for one in report.not_run) for report in found),
            "not_judged": len(lost),
            "errors": sum(report.count("error") for report in found),
            "warnings": sum(report.count("warning") for report in found),
            "infos": sum(report.count("info") for report in found),
            "codes": dict(sorted(codes.items())),
        },
    }
