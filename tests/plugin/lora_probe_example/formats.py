"""The output format `tsv`: `check`'s diagnostics as lines of tab-separated values, and a ledger's modules for `show`.

In: what a command found. Out: lines, with a header. The entry point is this module: it has a `name` and `renderers`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

from lora_probe.render.results import CheckResult, Recording

Cell = str | int | None


def check(result: CheckResult) -> Iterator[str]:
    yield _line(("adapter", "code", "severity", "message"))
    for report in result.reports:
        for diagnostic in report.diagnostics:
            yield _line((str(report.adapter), diagnostic.code, diagnostic.severity, diagnostic.message))


def show(recording: Recording) -> Iterator[str]:
    yield _line(("load", "module", "fate"))
    for load, ledger in recording.trace.loads:
        for row in ledger.rows:
            yield _line((load.load, row.module, row.fate))


def _line(cells: Iterable[Cell]) -> str:
    line = io.StringIO()
    csv.writer(line, delimiter="\t", lineterminator="").writerow(cells)
    return line.getvalue()


name = "tsv"
renderers = {"check": check, "show": show}
