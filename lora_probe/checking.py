"""`check`: what is wrong with an adapter, before anything runs.

In: adapter folders, and the base where it is known. Out: for each a `Report`: the ledger that each engine will come
to, every finding with its rule, and the rules that could not be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_probe.ledger import Ledger
from lora_probe.rules import Diagnostic, Severity


@dataclass(frozen=True)
class NotRun:
    """A rule, or several, that had nothing to look at."""

    codes: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Report:
    """What `check` found of one adapter folder. `ledgers` is empty where the files cannot be read at all."""

    adapter: Path
    model: str | None
    ledgers: Mapping[str, Ledger]
    diagnostics: tuple[Diagnostic, ...]
    not_run: tuple[NotRun, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def count(self, severity: Severity) -> int:
        return sum(diagnostic.severity == severity for diagnostic in self.diagnostics)

    @property
    def clean(self) -> bool:
        """No error was found."""
        return self.count("error") == 0
