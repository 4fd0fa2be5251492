"""The result of `check` for one adapter: `Report`.

In: what was predicted and found. Out: data for the formats, and whether the adapter is clean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_probe.ledger import Ledger
from lora_probe.presented import Presented
from lora_probe.rules import Diagnostic, Severity


@dataclass(frozen=True)
class NotRun:
    """Rules that could not run, and why."""

    codes: tuple[str, ...]
    why: str


@dataclass(frozen=True, repr=False)
class Report(Presented):
    """The result of `check` for one adapter folder. `ledgers` is empty if the files cannot be read at all. `vllm` is
    the version that the prediction is for; `ignored` counts findings of rules that were not selected. `not_served`
    holds the engines that the adapter is not judged for, because they do not serve its model, each with why."""

    adapter: Path
    model: str | None
    ledgers: Mapping[str, Ledger] = field(repr=False)
    diagnostics: tuple[Diagnostic, ...]
    not_run: tuple[NotRun, ...] = ()
    notes: tuple[str, ...] = field(default=())
    vllm: str = ""
    ignored: int = 0
    not_served: Mapping[str, str] = field(default_factory=dict)

    def count(self, severity: Severity) -> int:
        return sum(diagnostic.severity == severity for diagnostic in self.diagnostics)

    @property
    def clean(self) -> bool:
        """No error was found."""
        return self.count("error") == 0
