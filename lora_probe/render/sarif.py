"""Diagnostics as SARIF 2.1.0, for code scanning.

In: reports. Out: a log with one run. Locations are relative to the current folder, and modules are logical locations.
Rules that could not be run and folders that could not be judged are notifications of the invocation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lora_probe import __version__
from lora_probe.checking import Report
from lora_probe.errors import ProbeError
from lora_probe.names import projection_of
from lora_probe.render.cells import one_line
from lora_probe.render.markdown import first_sentence, page
from lora_probe.render.places import file_of, uri
from lora_probe.render.results import CheckResult
from lora_probe.rules import Diagnostic, Rule, Severity, all_rules

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
SEVERITIES: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "recommendation"}


def check(result: CheckResult) -> dict[str, Any]:
    """The log of one call of `check`."""
    return sarif(result.reports, [lost.error for lost in result.not_judged])


def error(error: ProbeError) -> dict[str, Any]:
    """The log of a call that judged nothing."""
    return sarif((), [error])


def sarif(reports: Sequence[Report], not_judged: Sequence[ProbeError] = ()) -> dict[str, Any]:
    """The log of these reports."""
    mentioned = {diagnostic.code for report in reports for diagnostic in report.diagnostics}
    mentioned |= {code for report in reports for skipped in report.not_run for code in skipped.codes}
    # Rules that need a run or a merge are listed only if a diagnostic mentions them.
    rules = [rule for code, rule in all_rules().items() if code in mentioned or not rule.measured]
    numbers = {rule.code: number for number, rule in enumerate(rules)}
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "lora-probe",
                        "version": __version__,
                        "semanticVersion": __version__,
                        "rules": [_rule(rule) for rule in rules],
                    }
                },
                "invocations": [
                    {
                        "executionSuccessful": not not_judged,
                        "toolExecutionNotifications": [*_not_run(reports, numbers), *map(_not_judged, not_judged)],
                    }
                ],
                "columnKind": "unicodeCodePoints",
                **_version(reports),
                "results": list(_results(reports, numbers)),
            }
        ],
    }


def _version(reports: Sequence[Report]) -> dict[str, Any]:
    """The vLLM version that the predictions are for, the same in all reports."""
    versions = [report.vllm for report in reports if report.vllm]
    return {"properties": {"vllm_version": versions[0]}} if versions else {}


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": first_sentence(rule)},
        "fullDescription": {"text": " ".join(rule.page.split())},
        "help": {"text": f"{rule.page}\n\nhint: {rule.hint}", "markdown": page(rule)},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {
            "tags": ["lora", *rule.in_engines],
            "problem.severity": SEVERITIES[rule.severity],
        },
    }


def _results(reports: Iterable[Report], numbers: dict[str, int]) -> Iterable[dict[str, Any]]:
    seen: dict[str, int] = {}
    for report in reports:
        for diagnostic in report.diagnostics:
            fingerprint = _fingerprint(report, diagnostic)
            seen[fingerprint] = seen.get(fingerprint, 0) + 1
            yield {
                "ruleId": diagnostic.code,
                **({"ruleIndex": numbers[diagnostic.code]} if diagnostic.code in numbers else {}),
                "level": LEVELS[diagnostic.severity],
                "message": {"text": _message(diagnostic)},
                "locations": [_location(report, diagnostic)],
                "partialFingerprints": {"loraProbeFinding/v1": f"{fingerprint}:{seen[fingerprint]}"},
                "properties": {"engines": list(diagnostic.engines), "adapter": str(report.adapter)},
            }


def _message(diagnostic: Diagnostic) -> str:
    about = f"{diagnostic.about}: " if diagnostic.about else ""
    hint = f"\nhint: {_text(diagnostic.hint)}" if diagnostic.hint else ""
    return f"{_text(about + diagnostic.message)}{hint}"


def _text(text: str) -> str:
    """One line. Viewers turn `[text](address)` into a link, and nothing in a file may become one."""
    return one_line(text).replace("](", "] (")


def _location(report: Report, diagnostic: Diagnostic) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": uri(file_of(report, diagnostic))}}
    if diagnostic.line is not None:
        physical["region"] = {"startLine": diagnostic.line}
    modules = [
        {"name": projection_of(module), "fullyQualifiedName": module, "kind": "module"}
        for module in dict.fromkeys(diagnostic.modules)
    ]
    return {"physicalLocation": physical, **({"logicalLocations": modules} if modules else {})}


def _fingerprint(report: Report, diagnostic: Diagnostic) -> str:
    """The same problem has the same fingerprint tomorrow: it depends neither on numbers in the message nor on lines."""
    identity = [diagnostic.code, uri(file_of(report, diagnostic)), sorted(diagnostic.modules)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _not_run(reports: Sequence[Report], numbers: dict[str, int]) -> Iterable[dict[str, Any]]:
    """One notification for each rule and reason, with all adapters that it applies to."""
    places: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        for skipped in report.not_run:
            for code in skipped.codes:
                places.setdefault((code, skipped.why), []).append(uri(report.adapter))
    for (code, why), adapters in places.items():
        yield {
            "level": "note",
            "message": {"text": _text(f"{code} was not run: {why}")},
            **({"associatedRule": {"id": code, "index": numbers[code]}} if code in numbers else {}),
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": place}}} for place in adapters],
        }


def _not_judged(error: ProbeError) -> dict[str, Any]:
    return {"level": "error", "message": {"text": _text(error.message)}}
