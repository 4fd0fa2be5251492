"""Findings as SARIF 2.1.0, for code scanning.

In: reports. Out: a log of one run. Places are relative to where the command runs; modules are logical locations; rules
that could not be run, and folders that could not be judged, are notifications of the invocation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from lora_probe import __version__
from lora_probe.checking import Report
from lora_probe.checking.folders import NotJudged
from lora_probe.names import name_modules
from lora_probe.render.cells import one_line
from lora_probe.render.markdown import first_sentence, page
from lora_probe.render.places import file_of, uri
from lora_probe.rules import Diagnostic, Rule, Severity, all_rules

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}
SEVERITIES: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "recommendation"}
MEASURED = ("applied", "agrees", "merge")
"""Stations that only a run or a merge has: rules of these are listed if they were found, else not."""


def sarif(found: Sequence[Report], lost: Sequence[NotJudged] = ()) -> dict[str, Any]:
    """The log of one call of `check`."""
    mentioned = {d.code for report in found for d in report.diagnostics}
    mentioned |= {code for report in found for one in report.not_run for code in one.codes}
    known = all_rules()
    rules = [rule for code, rule in known.items() if code in mentioned or rule.station not in MEASURED]
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
                        "executionSuccessful": not lost,
                        "toolExecutionNotifications": [*_not_run(found, numbers), *map(_not_judged, lost)],
                    }
                ],
                "columnKind": "unicodeCodePoints",
                **_for(found),
                "results": list(_results(found, numbers)),
            }
        ],
    }


def _for(found: Sequence[Report]) -> dict[str, Any]:
    """The vLLM that the predictions are for, the same in all reports."""
    versions = [report.vllm for report in found if report.vllm]
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
            "tags": ["lora", *rule.engines],
            "problem.severity": SEVERITIES[rule.severity],
        },
    }


def _results(found: Iterable[Report], numbers: dict[str, int]) -> Iterable[dict[str, Any]]:
    seen: dict[str, int] = {}
    for report in found:
        for diagnostic in report.diagnostics:
            print_of = _fingerprint(report, diagnostic)
            seen[print_of] = seen.get(print_of, 0) + 1
            yield {
                "ruleId": diagnostic.code,
                **({"ruleIndex": numbers[diagnostic.code]} if diagnostic.code in numbers else {}),
                "level": LEVELS[diagnostic.severity],
                "message": {"text": _message(diagnostic)},
                "locations": [_location(report, diagnostic)],
                "partialFingerprints": {"loraProbeFinding/v1": f"{print_of}:{seen[print_of]}"},
                "properties": {"engines": list(diagnostic.engines), "adapter": str(report.adapter)},
            }


def _message(diagnostic: Diagnostic) -> str:
    about = name_modules(diagnostic.modules)
    about = "" if not about or about in diagnostic.message else f"{about}: "
    hint = f"\nhint: {_text(diagnostic.hint)}" if diagnostic.hint else ""
    return f"{_text(about + diagnostic.message)}{hint}"


def _text(text: str) -> str:
    """One line. A viewer makes a link of `[words](address)`, and nothing in a file is an address of ours."""
    return one_line(text).replace("](", "] (")


def _location(report: Report, diagnostic: Diagnostic) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": uri(file_of(report, diagnostic))}}
    if diagnostic.line is not None:
        physical["region"] = {"startLine": diagnostic.line}
    modules = [
        {"name": module.rpartition(".")[2], "fullyQualifiedName": module, "kind": "module"}
        for module in dict.fromkeys(diagnostic.modules)
    ]
    return {"physicalLocation": physical, **({"logicalLocations": modules} if modules else {})}


def _fingerprint(report: Report, diagnostic: Diagnostic) -> str:
    """The same finding tomorrow has the same: neither numbers in the message nor lines are in it."""
    what = [diagnostic.code, uri(file_of(report, diagnostic)), sorted(diagnostic.modules)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _not_run(found: Sequence[Report], numbers: dict[str, int]) -> Iterable[dict[str, Any]]:
    """One notification for each rule and reason, at all adapters that it holds for."""
    places: dict[tuple[str, str], list[str]] = {}
    for report in found:
        for one in report.not_run:
            for code in one.codes:
                places.setdefault((code, one.why), []).append(uri(report.adapter))
    for (code, why), adapters in places.items():
        yield {
            "level": "note",
            "message": {"text": _text(f"{code} was not run: {why}")},
            **({"associatedRule": {"id": code, "index": numbers[code]}} if code in numbers else {}),
            "locations": [{"physicalLocation": {"artifactLocation": {"uri": place}}} for place in adapters],
        }


def _not_judged(lost: NotJudged) -> dict[str, Any]:
    return {"level": "error", "message": {"text": _text(lost.error.message)}}
