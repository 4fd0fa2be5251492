"""JSON of `rule`: rules with their pages.

In: a `RuleList`. Out: a plain dictionary.
"""

from __future__ import annotations

from typing import Any

from lora_probe.render.json import SCHEMA_VERSION
from lora_probe.render.results import RuleList


def rules_json(rules: RuleList) -> dict[str, Any]:
    """Every rule with its whole page, whether `--all` was passed or not."""
    return {
        "schema_version": SCHEMA_VERSION,
        "rules": [
            {
                "code": rule.code,
                "name": rule.name,
                "station": rule.station,
                "engines": list(rule.in_engines),
                "severity": rule.severity,
                "hint": rule.hint,
                "page": rule.page,
            }
            for rule in rules.rules
        ],
    }
