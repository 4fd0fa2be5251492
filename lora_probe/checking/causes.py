"""One diagnostic for each cause.

In: the diagnostics of a report, and the predicted ledgers. Out: those that do not follow from another one. A cause that
only some engines report is extended by the engines that report its consequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_probe.adapter import CONFIG
from lora_probe.ledger import Ledger
from lora_probe.names import in_words
from lora_probe.prediction import predictors
from lora_probe.rules import Diagnostic, Rule, all_rules
from lora_probe.rules.paths import bare

DIFFER = "LP410"


def causes(diagnostics: Sequence[Diagnostic], ledgers: Iterable[Ledger]) -> list[Diagnostic]:
    """Those of `diagnostics` that are not explained by others (`Rule.explains`).

    That engines differ (LP410) is explained by findings that name all of its modules, each in one of the engines only;
    these then state in which engine the modules take effect.
    """
    names = {bare(row.stored_as): row.module for ledger in ledgers for row in ledger.rows if row.stored_as is not None}
    every = [(diagnostic, _modules(diagnostic, names)) for diagnostic in _together(diagnostics)]
    kept, rules = list(every), all_rules()
    for consequence in list(kept):
        explaining = [cause for cause in kept if cause is not consequence and _may_explain(rules, cause, consequence)]
        modules = set().union(*(of_cause for _, of_cause in explaining))
        if explaining and (not modules or consequence[1] <= modules):
            kept.remove(consequence)
            for cause in explaining:
                engines = _united(cause[0].engines, consequence[0].engines)
                kept[kept.index(cause)] = replace(cause[0], engines=engines), cause[1]
    for about in [about for about in kept if about[0].code == DIFFER]:
        kept.remove(about)
        kept = _with_difference(kept, about)
    return [diagnostic for diagnostic, _ in kept]


_About = tuple[Diagnostic, frozenset[str]]
"""A diagnostic, and the modules of the base that it is about."""


def _together(diagnostics: Sequence[Diagnostic]) -> list[Diagnostic]:
    """Findings of one rule and field as one, if one has all modules of the other: an engine loses the rest of them for
    other reasons."""
    merged: list[Diagnostic] = []
    for diagnostic in diagnostics:
        for number, before in enumerate(merged):
            if _is_same(before, diagnostic):
                larger = max(before, diagnostic, key=lambda d: len(d.modules))
                merged[number] = replace(larger, engines=_united(before.engines, diagnostic.engines))
                break
        else:
            merged.append(diagnostic)
    return merged


def _is_same(first: Diagnostic, second: Diagnostic) -> bool:
    if (first.code, first.path, first.field) != (second.code, second.path, second.field):
        return False
    few, many = sorted((set(first.modules), set(second.modules)), key=len)
    return bool(few) and few <= many


def _modules(diagnostic: Diagnostic, names: Mapping[str, str]) -> frozenset[str]:
    """`names` are those of the base by those of the file: a finding may be about either."""
    return frozenset(bare(names.get(bare(module), module)) for module in diagnostic.modules)


def _may_explain(rules: Mapping[str, Rule], cause: _About, consequence: _About) -> bool:
    """Whether the rule of `cause` explains that of `consequence`, and both are about the same modules or place."""
    (first, modules), (second, others) = cause, consequence
    rule = rules.get(first.code)
    if rule is None or second.code not in rule.explains or first.severity != "error":
        return False
    if modules and others:
        return bool(modules & others)
    # What is wrong with the file as a whole explains everything, and a field what it makes of the tensors.
    whole_file = not modules and first.field is None and first.path is not None and Path(first.path).name != CONFIG
    of_field = not modules and first.field is not None and second.field is None
    return whole_file or of_field or (first.path, first.field) == (second.path, second.field)


def _with_difference(kept: list[_About], about: _About) -> list[_About]:
    """`kept` and, unless they explain it, the finding that engines differ."""
    differing, modules = about
    engines = set(differing.engines)
    explaining = [
        cause
        for cause in kept
        if cause[0].severity == "error" and cause[1] & modules and engines > (engines & set(cause[0].engines)) > set()
    ]
    if not modules <= set().union(*(of_cause for _, of_cause in explaining)):
        return [*kept, about]
    for cause in explaining:
        diagnostic, count, total = cause[0], len(cause[1] & modules), len(cause[1])
        having = [predictors()[name].title for name in differing.engines if name not in diagnostic.engines]
        these = "these modules take" if total > 1 else "this module takes"
        some = these if count == total else f"{count} of these modules {'take' if count > 1 else 'takes'}"
        message = f"{diagnostic.message}; {some} effect in {in_words(having)}"
        kept[kept.index(cause)] = replace(diagnostic, message=message), cause[1]
    return kept


def _united(engines: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in predictors() if name in {*engines, *others})
