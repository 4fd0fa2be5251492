"""Rules: each is one way in which an adapter fails, with a stable code and a page.

In: facts about a module, or a `Subject`. Out: a `Finding` at a station, or `AdapterFinding`s for the whole adapter. The
families are named by their codes: `lp1_config` to `lp7_merging`.
"""

from __future__ import annotations

from lora_probe.rules.diagnostics import Diagnostic, as_json, diagnose, diagnostic, rule_of
from lora_probe.rules.registry import (
    AdapterFinding,
    Family,
    Needs,
    Rule,
    Sentence,
    Severity,
    all_rules,
    family_of,
    rule,
    survey,
    surveys,
)

__all__ = [
    "AdapterFinding",
    "Diagnostic",
    "Family",
    "Needs",
    "Rule",
    "Sentence",
    "Severity",
    "all_rules",
    "as_json",
    "diagnose",
    "diagnostic",
    "family_of",
    "rule",
    "rule_of",
    "survey",
    "surveys",
]
