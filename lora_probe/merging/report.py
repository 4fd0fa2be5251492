"""The result of a merge check: `MergeReport`, with one `ModuleMerge` for each site of the adapter.

In: the modules, the other tensors that differ, and what could not be judged. Out: the verdict and the diagnostics. A
merge is `verified` if it is correct and keeps the effect; rounding is judged over all modules, weighted by energy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_probe.ledger import Finding
from lora_probe.names import Key, Universe, name_modules
from lora_probe.rules import Diagnostic, Rule, all_rules
from lora_probe.rules.diagnostics import under
from lora_probe.rules.lp7_merging import lost_to_rounding

Verdict = Literal["verified", "differs", "undecided"]

KEPT = 0.9
"""The share of the change that all modules together must keep."""
KEPT_BY_EACH = 0.5
"""The share that each module must keep."""


@dataclass(frozen=True)
class ModuleMerge:
    """One site. Ratios are relative to ΔW: `residual` ‖observed − ΔW‖ / ‖ΔW‖, `share` ⟨observed, ΔW⟩ / ⟨ΔW, ΔW⟩,
    `effect_kept` ⟨replay − W, ΔW⟩ / ⟨ΔW, ΔW⟩; None if ΔW is zero. `implied_scaling` is the scaling that explains the
    change, None if none does. `bit_exact`: every value is what `arithmetic` gives, up to the order of the sums in B·A;
    `by_order_of_sums` counts the values that depend on that order. `energy` is ‖ΔW‖²."""

    key: Key
    label: str
    tensor: str
    status: Verdict
    findings: tuple[Finding, ...]
    scaling: float | None
    residual: float | None
    share: float | None
    effect_kept: float | None
    implied_scaling: float | None
    bit_exact: bool
    arithmetic: str
    by_order_of_sums: int = 0
    energy: float = 0.0


@dataclass(frozen=True)
class TensorFinding:
    """A finding about one tensor that no module of the adapter explains, or about the adapter as a whole."""

    name: str
    finding: Finding


@dataclass(frozen=True)
class MergeReport:
    """The whole report. `compared` counts tensors, `read` the bytes of both checkpoints. Of the `untouched` tensors,
    which the adapter does not change, `foreign` differ from the base's."""

    adapter: Path
    base: Path
    merged: Path
    base_dtype: str
    merged_dtype: str
    modules: tuple[ModuleMerge, ...]
    tensors: tuple[TensorFinding, ...]
    compared: int
    untouched: int
    foreign: int
    read: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def effect_kept(self) -> float | None:
        """The share of the change that PEFT's arithmetic keeps, over all modules, weighted by ‖ΔW‖²."""
        measured = [(m.effect_kept * m.energy, m.energy) for m in self.modules if m.effect_kept is not None]
        total = sum(energy for _, energy in measured)
        return sum(kept for kept, _ in measured) / total if total > 0 else None

    @property
    def rounding(self) -> tuple[TensorFinding, ...]:
        """Losses by rounding: the modules below KEPT_BY_EACH, or else the whole adapter if it is below KEPT."""
        losses = [
            TensorFinding(m.label, lost_to_rounding(m.effect_kept, self.merged_dtype))
            for m in self.modules
            if m.effect_kept is not None and m.status == "verified" and m.effect_kept < KEPT_BY_EACH
        ]
        kept = self.effect_kept
        if not losses and kept is not None and kept < KEPT:
            losses = [TensorFinding("", lost_to_rounding(kept, self.merged_dtype))]
        return tuple(losses)

    @property
    def verdict(self) -> Verdict:
        values = {finding.value for _, finding in self.findings()}
        if values & {"wrong", "absent"}:
            return "differs"
        return "undecided" if "unknown" in values or not self.modules else "verified"

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """All findings, each with the name of its module or tensor, modules first."""
        for module in self.modules:
            for finding in module.findings:
                yield module.label, finding
        for tensor in (*self.tensors, *self.rounding):
            yield tensor.name, tensor.finding

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """One diagnostic for equal findings: `12 of 12 modules: merged twice`."""
        rules = all_rules()
        groups: dict[tuple[str, str], list[str]] = {}
        for name, finding in self.findings():
            same = finding.message if rules[finding.code].per_message else ""
            groups.setdefault((finding.code, same), []).append(name)
        messages = {(finding.code, name): finding.message for name, finding in self.findings()}
        return tuple(
            self._diagnostic(rules[code], names, messages[code, names[0]]) for (code, _), names in groups.items()
        )

    def _diagnostic(self, rule: Rule, names: list[str], message: str) -> Diagnostic:
        labels = dict.fromkeys(module.label for module in self.modules)
        named = [name for name in dict.fromkeys(names) if name]
        about = "the adapter as a whole"
        if named and labels.keys() >= set(named):
            about = f"{len(named)} of {len(labels)} modules"
            about += "" if len(named) == len(labels) else f" ({_few_modules(named, labels)})"
        elif named:
            about = named[0] if len(named) == 1 else f"{len(named)} tensors ({_few(named)})"
        more = "" if len(named) < 2 or rule.per_message else " (the first one)"
        return under(rule, f"{about}: {message}{more}", tuple(named))


def _few(names: Iterable[str], shown: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:shown]) + (f" and {len(listed) - shown} more" if len(listed) > shown else "")


def _few_modules(labels: list[str], every: Iterable[str], longest: int = 160) -> str:
    """Modules by layers and projections; only the first few if that is too long."""
    text = name_modules(labels, Universe(tuple(every)))
    return text if len(text) <= longest else _few(labels)


def unmeasured(key: Key, label: str, tensor: str, status: Verdict, *findings: Finding) -> ModuleMerge:
    """A module without measurements: it has no place in the base, or its tensor is missing."""
    return ModuleMerge(key, label, tensor, status, findings, None, None, None, None, None, False, "unknown")
