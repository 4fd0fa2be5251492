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
from lora_probe.rules import Diagnostic, all_rules
from lora_probe.rules.paths import bare

DIFFER = "LP410"


def causes(diagnostics: Sequence[Diagnostic], ledgers: Iterable[Ledger]) -> list[Diagnostic]:
    """Those of `diagnostics` that are not explained by others (`Rule.explains`).

    That engines differ (LP410) is explained by findings that name all of its modules, each in one of the engines only;
    these then state in which engine the modules take effect.
    """
    names = {bare(row.stored_as): row.module for ledger in ledgers for row in ledger.rows if row.stored_as is not None}
    every = [(diagnostic, _modules(diagnostic, names)) for diagnostic in _together(diagnostics)]
    kept = list(every)
    for consequence in list(kept):
        explaining = [cause for cause in kept if cause is not consequence and _may_explain(cause, consequence)]
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
    """Findings with the same message, each in other engines, as one."""
    merged: dict[tuple[str, str, str | None, int | None], Diagnostic] = {}
    for diagnostic in diagnostics:
        key = (diagnostic.code, diagnostic.message, diagnostic.path, diagnostic.line)
        before = merged.get(key, diagnostic)
        modules = tuple(dict.fromkeys((*before.modules, *diagnostic.modules)))
        merged[key] = replace(before, modules=modules, engines=_united(before.engines, diagnostic.engines))
    return list(merged.values())


def _modules(diagnostic: Diagnostic, names: Mapping[str, str]) -> frozenset[str]:
    """`names` are those of the base by those of the file: a finding may be about either."""
    return frozenset(bare(names.get(bare(module), module)) for module in diagnostic.modules)


def _may_explain(cause: _About, consequence: _About) -> bool:
    """Whether the rule of `cause` explains that of `consequence`, and both are about the same modules or place."""
    (first, modules), (second, others) = cause, consequence
    rule = all_rules().get(first.code)
    if rule is None or second.code not in rule.explains or first.severity != "error":
        return False
    if modules and others:
        return bool(modules & others)
    whole_file = not modules and first.path is not None and Path(first.path).name != CONFIG
    return whole_file or (first.path, first.line) == (second.path, second.line)


def _with_difference(kept: list[_About], about: _About) -> list[_About]:
    """`kept` and, unless they explain it, the finding that engines differ."""
    differing, modules = about
    engines = set(differing.engines)
    explaining = [
        cause
        for cause in kept
        if cause[0].severity == "error"
        and cause[1]
        and cause[1] <= modules
        and engines > (engines & set(cause[0].engines)) > set()
    ]
    if not explaining or not modules <= set().union(*(of_cause for _, of_cause in explaining)):
        return [*kept, about]
    for cause in explaining:
        diagnostic = cause[0]
        having = [predictors()[name].title for name in differing.engines if name not in diagnostic.engines]
        these = "this module takes" if len(diagnostic.modules) == 1 else "these modules take"
        message = f"{diagnostic.message}; {these} effect in {in_words(having)}"
        kept[kept.index(cause)] = replace(diagnostic, message=message), cause[1]
    return kept


def _united(engines: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in predictors() if name in {*engines, *others})
