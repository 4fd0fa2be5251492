"""Findings for a person or a program: `Diagnostic`.

In: a ledger, or what a rule on a whole adapter found. Out: one `Diagnostic` for each rule and station, and the JSON
that every command writes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_probe.files import shown
from lora_probe.ledger import Ledger, Value, clauses
from lora_probe.rules.registry import Found, Rule, Severity, all_rules


@dataclass(frozen=True)
class Diagnostic:
    """One finding for a person or a program, over all modules that share it."""

    code: str
    name: str
    severity: Severity
    message: str
    hint: str
    modules: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    path: str | None = None
    line: int | None = None


def diagnose(ledger: Ledger) -> list[Diagnostic]:
    """The ledger's losses and errors as diagnostics, one for each rule and station."""
    known = all_rules()
    found = []
    if ledger.refused:
        found.append(_diagnostic(known["LP401"], ledger.message, (), ledger.engine))
    for sentence, finding, rows in clauses(ledger):
        station, _ = rows[0].decisive or ("", finding)
        if ledger.refused and station != "stored" and not finding.code.startswith(("LP2", "LP3")):
            # What the engine would have done with it nobody knows; what is wrong in the file may be the reason.
            continue
        modules = tuple(row.module for row in rows)
        code = finding.code or "LP500"
        rule = known.get(code) or _unknown(code, finding.value)
        found.append(_diagnostic(rule, sentence, modules, ledger.engine))
    return found


def _unknown(code: str, value: Value) -> Rule:
    """A rule that only a newer lora-probe has: a trace holds the codes of whoever wrote it."""
    hint = "this lora-probe has no such rule: a newer version wrote the trace; upgrade to read about it"
    return Rule(shown(code), "unknown-rule", "load", value, "error", hint, page="")


def diagnostic(rule: Rule, found: Found, path: Path, line: int | None) -> Diagnostic:
    """What a rule on a whole adapter found, in the file and line that it is about."""
    modules = tuple(dict.fromkeys(module for module, _, _ in found.keys))
    engines = found.engines or rule.in_engines
    return Diagnostic(
        rule.code, rule.name, rule.severity, found.message, rule.hint, modules, engines, str(found.path or path), line
    )


def _diagnostic(rule: Rule, message: str, modules: tuple[str, ...], engine: str) -> Diagnostic:
    return Diagnostic(rule.code, rule.name, rule.severity, message, rule.hint, modules, (engine,))


def as_json(diagnostic: Diagnostic) -> dict[str, Any]:
    return {
        "code": diagnostic.code,
        "name": diagnostic.name,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        "hint": diagnostic.hint,
        "modules": list(diagnostic.modules),
        "engines": list(diagnostic.engines),
        "path": diagnostic.path,
        "line": diagnostic.line,
    }
