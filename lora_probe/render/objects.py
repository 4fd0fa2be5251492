"""How results look in Python: the `repr`, the HTML, the dictionary and the tables of each kind of result.

In: a result of a public function. Out: texts, dictionaries, columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_probe.adapter import Adapter
from lora_probe.adapter.side_by_side import AdapterDiff
from lora_probe.adapter.spectrum import spectra_of
from lora_probe.checking import Report
from lora_probe.checking.cost import ServingCost
from lora_probe.comparison import Comparison, Comparisons
from lora_probe.errors import ProbeError
from lora_probe.ledger import Ledger, headline
from lora_probe.ledger import as_json as ledger_json
from lora_probe.merging.parity import Parity
from lora_probe.recording import Trace
from lora_probe.render.document import Document
from lora_probe.render.documents import comparison, cost, inspection, merge, parts, recording, report
from lora_probe.render.html import fragment
from lora_probe.render.json import check as check_json
from lora_probe.render.json import compare as compare_json
from lora_probe.render.json import cost as cost_json
from lora_probe.render.json import inspect as inspect_json
from lora_probe.render.json import parity as parity_json
from lora_probe.render.json import side_by_side as side_by_side_json
from lora_probe.render.json import trace as trace_json
from lora_probe.render.results import Inspection, Recording
from lora_probe.render.tabular import Columns, tables_of
from lora_probe.render.verdicts import (
    Verdict,
    of_adapter,
    of_comparison,
    of_comparisons,
    of_cost,
    of_diff,
    of_parity,
    of_recording,
    of_report,
)


@dataclass(frozen=True)
class View:
    """How one kind of result is shown."""

    verdict: Callable[[Any], Verdict]
    document: Callable[[Any], Document]
    json: Callable[[Any], dict[str, Any]]


def _of_ledger(ledger: Ledger) -> Verdict:
    return Verdict(headline(ledger), "good" if ledger.healthy else "bad")


def _ledger(ledger: Ledger) -> Document:
    verdict, named = _of_ledger(ledger), [(ledger.engine, ledger)]
    sections = (*parts.fate_heats(named), *parts.ledger_sections(ledger, "Stations"))
    return Document(ledger.engine, verdict.text, verdict.tone, sections=sections)


VIEWS: dict[type, View] = {
    Adapter: View(
        of_adapter,
        lambda adapter: inspection.inspection(Inspection(adapter)),
        lambda adapter: inspect_json.inspection_json(Inspection(adapter)),
    ),
    AdapterDiff: View(of_diff, inspection.side_by_side, side_by_side_json.side_by_side_json),
    Comparison: View(of_comparison, comparison.comparison, compare_json.comparison_json),
    Comparisons: View(of_comparisons, comparison.comparisons, compare_json.comparisons_json),
    Ledger: View(_of_ledger, _ledger, ledger_json),
    ServingCost: View(of_cost, cost.cost, cost_json.cost_json),
    Parity: View(of_parity, merge.parity, parity_json.parity_json),
    Report: View(of_report, report.report, check_json.report_json),
    Trace: View(
        lambda trace: of_recording(Recording(trace)),
        lambda trace: recording.recording(Recording(trace)),
        lambda trace: trace_json.recording_json(Recording(trace)),
    ),
}


def short(result: Any) -> str:
    """`<Trace run.lptrace: 90 of 90 modules took effect>`."""
    try:
        text = VIEWS[type(result)].verdict(result).text
    except (ProbeError, OSError) as error:
        # Its files are gone, or damaged by now.
        text = str(error)
    path = getattr(result, "path", None) or getattr(result, "adapter", None) or getattr(result, "engine", None)
    return f"<{type(result).__name__}{f' {path}' if path is not None else ''}: {text}>"


def html(result: Any) -> str:
    """The document of the result as a part of a notebook."""
    return fragment(VIEWS[type(result)].document(result))


def as_dict(result: Any, *, norms: bool = False) -> dict[str, Any]:
    """As `--format json`.

    Raises:
        TypeError: `norms` for anything but an adapter.
    """
    if not norms:
        return VIEWS[type(result)].json(result)
    if not isinstance(result, Adapter):
        raise TypeError(f"`norms` is for adapters, not for {type(result).__name__}")
    return inspect_json.inspection_json(Inspection(result, spectra_of(result)))


def tables(result: Any, **options: Any) -> dict[str, Columns]:
    """The lists of `as_dict` as columns."""
    return tables_of(as_dict(result, **options))
