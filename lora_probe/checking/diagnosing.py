"""The findings of a prediction as diagnostics.

In: an adapter, and what is predicted of it. Out: a `Diagnostic` for each finding of a rule, for each group of modules
that an engine loses, and for modules that only some engines lose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_probe.adapter import Adapter
from lora_probe.ledger import Fate, Ledger, clauses
from lora_probe.names import Key, in_words, name_modules, path_of
from lora_probe.prediction import Prediction, predictors
from lora_probe.rules import Diagnostic, all_rules, diagnostic
from lora_probe.rules.diagnostics import of_clause, under
from lora_probe.rules.lp4_serving import engines_differ


def diagnostics_of(adapter: Adapter, prediction: Prediction) -> Iterator[Diagnostic]:
    """Every diagnostic, those that follow from others included."""
    reported = set()
    for rule, finding in prediction.findings:
        reported.add(rule.code)
        yield diagnostic(rule, finding, *_place(adapter, finding.field))
    merged: dict[tuple[str, tuple[str, ...]], Diagnostic] = {}
    rules = all_rules()
    for engine, ledger in prediction.ledgers.items():
        for clause in clauses(ledger):
            code = clause.finding.code
            if clause.finding.value == "unknown" or code in reported or not code:
                continue
            if (before := merged.get((code, clause.modules))) is not None:
                merged[code, clause.modules] = replace(before, engines=(*before.engines, engine))
                continue
            path, line = _place(adapter, clause.finding.field)
            merged[code, clause.modules] = replace(
                of_clause(rules[code], clause, engine), message=clause.text, path=str(path), line=line
            )
    yield from merged.values()
    if reported.isdisjoint(rules["LP410"].follows):
        yield from _differing(adapter, prediction.ledgers)


def _place(adapter: Adapter, field: str | None) -> tuple[Path, int | None]:
    """The file and the line of a finding: those of its config key, or the weights file if it has none."""
    if field is None:
        return adapter.weights.path, None
    return adapter.config.path, adapter.config.lines.get(field)


def _differing(adapter: Adapter, ledgers: Mapping[str, Ledger]) -> Iterator[Diagnostic]:
    """LP410: the modules that take effect in some engines and are lost in others. Engines that refuse the adapter do
    not count."""
    fates: dict[Key, dict[str, Fate]] = {}
    for engine, ledger in ledgers.items():
        for row in ledger.rows if not ledger.refused else ():
            fates.setdefault(row.key, {})[engine] = row.fate
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Key]] = {}
    for key, of_module in fates.items():
        having, losing = (
            tuple(engine for engine, fate in of_module.items() if fate == wanted) for wanted in ("took effect", "lost")
        )
        if having and losing:
            groups.setdefault((having, losing), []).append(key)
    order = list(ledgers)
    rule = all_rules()["LP410"]
    universe = next((ledger.names for ledger in ledgers.values()), None)
    for (having, losing), keys in sorted(groups.items(), key=lambda item: [order.index(name) for name in item[0][0]]):
        engines = tuple(sorted((*having, *losing), key=order.index))
        names = name_modules(map(path_of, keys), universe)
        message = engines_differ(_titles(engines), len(keys), len(fates), _only_in(having, losing, names)).message
        modules = tuple(module for module, _, _ in keys)
        yield under(rule, message, modules, engines, str(adapter.path), names_modules=True)


def _only_in(having: tuple[str, ...], losing: tuple[str, ...], names: str) -> str:
    """In which engines modules take effect and in which they do not, by the titles of the engines."""
    two = len(having) == len(losing) == 1
    where = f"{_titles(having)} alone" if two else f"{_titles(having)} and are lost in {_titles(losing)}"
    return f"take effect in {where} ({names})"


def _titles(engines: Sequence[str]) -> str:
    return in_words([predictors()[engine].title for engine in engines])
