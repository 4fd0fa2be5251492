"""CSV of each result: a row for each module, of `check` a row for each finding.

In: a command's result. Out: CSV with a header, in the fields of `--format json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_probe.render.json.check import report_json
from lora_probe.render.json.compare import comparison_json
from lora_probe.render.json.inspect import inspection_json
from lora_probe.render.json.parity import parity_json
from lora_probe.render.json.side_by_side import side_by_side_json
from lora_probe.render.json.trace import recording_json
from lora_probe.render.results import CheckResult, CheckRun, Inspection, Paged, Recording
from lora_probe.render.tabular import as_csv

if TYPE_CHECKING:
    from lora_probe.adapter.side_by_side import AdapterDiff
    from lora_probe.checking import Report
    from lora_probe.comparison import Comparison, Comparisons
    from lora_probe.merging.parity import Parity

FINDING = ("adapter", "code", "name", "severity", "message", "path", "line", "hint")
"""The columns of `check`, also without a finding."""


def inspection(result: Inspection) -> str:
    """A row for each module."""
    return as_csv(inspection_json(result)["modules"])


def side_by_side(result: AdapterDiff) -> str:
    """A row for each module of both adapters."""
    return as_csv(side_by_side_json(result)["modules"])


def recording(result: Recording) -> str:
    """A row for each module of each load, with its fate and its contribution."""
    return as_csv([row for load in recording_json(result)["loads"] for row in _of_load(load)])


def _of_load(load: dict[str, Any]) -> Iterator[dict[str, Any]]:
    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return entry["module"], entry["parameter"], entry["expert"]

    measured = {key(entry): entry for entry in load["modules"] or ()}
    empty = {"rows": None, "delta_norm": None, "base_norm": None, "strength": None}
    for entry in load["ledger"]["modules"]:
        numbers = measured.get(key(entry), empty)
        yield {
            "adapter": load["load"]["name"],
            "load": load["load"]["load"],
            **entry,
            **{name: numbers.get(name) for name in empty},
        }


def comparison(result: Comparison) -> str:
    """A row for each module that both runs have."""
    return as_csv(comparison_json(result)["modules"])


def comparisons(result: Comparisons) -> str:
    """The same, with the adapter in the first column."""
    each = result.by_adapter.items()
    return as_csv([{"adapter": name} | row for name, of in each for row in comparison_json(of)["modules"]])


def parity(result: Parity) -> str:
    """A row for each module."""
    return as_csv(parity_json(result)["modules"])


def _page(report: Report, run: CheckRun) -> list[dict[str, Any]]:
    data = report_json(report)
    return [{"adapter": data["adapter"]} | finding for finding in data["diagnostics"]]


def _whole(result: CheckResult) -> str:
    rows = [row for page in result.pages for row in page]
    for lost in result.not_judged:
        message = {"severity": "unread", "message": lost.error.message, "hint": lost.error.hint}
        rows.append({"adapter": str(lost.path)} | message)
    return as_csv([{name: row.get(name) for name in FINDING} for row in rows]) if rows else ",".join(FINDING)


CHECK = Paged(_page, _whole)
