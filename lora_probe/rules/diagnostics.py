"""Findings for a person or a program: `Diagnostic`.

In: a ledger, or what a rule on a whole adapter found. Out: one `Diagnostic` for each rule and station, and the JSON
that every command writes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_probe.files import shown
from lora_probe.ledger import Clause, Ledger, Value, clauses
from lora_probe.rules.lp5_loading import reloaded
from lora_probe.rules.registry import AdapterFinding, Rule, Severity, all_rules


@dataclass(frozen=True)
class Diagnostic:
    """One finding for a person or a program, over all modules that share it. `names_modules`: the message does so;
    otherwise `about` names them, as shortly as no other module is named. `field` is the key of adapter_config.json that
    caused it."""

    code: str
    name: str
    severity: Severity
    message: str
    hint: str
    modules: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    path: str | None = None
    line: int | None = None
    names_modules: bool = False
    about: str = ""
    field: str | None = None


def under(
    rule: Rule,
    message: str,
    modules: tuple[str, ...] = (),
    engines: tuple[str, ...] = (),
    path: str | None = None,
    line: int | None = None,
    *,
    hint: str = "",
    names_modules: bool = False,
    field: str | None = None,
) -> Diagnostic:
    """A finding under a rule, with the rule's hint unless another is passed."""
    facts = rule.code, rule.name, rule.severity, message, hint or rule.hint
    return Diagnostic(*facts, modules, engines, path, line, names_modules, field=field)


def diagnose(ledger: Ledger) -> list[Diagnostic]:
    """The ledger's losses and errors as diagnostics, one for each rule and station."""
    rules = all_rules()
    diagnostics = []
    if ledger.refused:
        diagnostics.append(under(rules["LP401"], ledger.message, engines=(ledger.engine,)))
    if (repeated := reloaded(ledger.reloads)) is not None:
        diagnostics.append(under(rules[repeated.code], repeated.message, engines=(ledger.engine,)))
    for clause in clauses(ledger):
        finding = clause.finding
        if ledger.refused and clause.station != "stored" and not finding.code.startswith(("LP2", "LP3")):
            # What the engine would have done is unknown; errors in the file may be the reason of the refusal.
            continue
        code = finding.code or "LP500"
        rule = rule_of(code, finding.value)
        diagnostics.append(of_clause(rule, clause, ledger.engine))
    return diagnostics


def of_requests(code: str, message: str, engine: str) -> Diagnostic:
    """What went wrong for requests in an engine, under the rule `code`."""
    return under(rule_of(code, "wrong"), f"{message} ({code})", engines=(engine,))


def rule_of(code: str, value: Value) -> Rule:
    """The rule of a code in a trace. One that only a newer lora-probe has has no page here: a trace holds the codes of
    whoever wrote it."""
    if (rule := all_rules().get(code)) is not None:
        return rule
    hint = "upgrade lora-probe to read about this rule: a newer version wrote the trace"
    return Rule(shown(code), "unknown-rule", "load", value, hint, page="")


def diagnostic(rule: Rule, finding: AdapterFinding, path: Path, line: int | None) -> Diagnostic:
    """What a rule on a whole adapter found, in the file and line that it is about."""
    modules = tuple(dict.fromkeys(module for module, _, _ in finding.keys))
    engines = finding.engines or rule.in_engines
    place = str(finding.path or path), line
    return under(rule, finding.message, modules, engines, *place, hint=finding.hint, field=finding.field)


def of_clause(rule: Rule, clause: Clause, engine: str) -> Diagnostic:
    """A clause of an engine's ledger."""
    names, finding = clause.names_modules, clause.finding
    about = rule, clause.with_code, clause.modules, (engine,)
    return under(*about, hint=finding.hint, names_modules=names, field=finding.field)


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
