"""The ledger of an engine, predicted from files: `stored`, `read` and `placed` of every module.

In: a `Subject`. Out: for each engine a `Ledger` as `trace` would measure it there, with the reason for every module
that will not take effect, and the findings of the rules on the whole adapter. What differs between engines is in their
predictors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from lora_probe.adapter.spectrum import Spectrum, spectra_of
from lora_probe.files.limits import step
from lora_probe.ledger import Finding, Ledger, Row, Station, worse
from lora_probe.names import Key
from lora_probe.prediction.places import aliases, engine_names
from lora_probe.prediction.predictor import Predictor, Refusal, predictors
from lora_probe.rules import AdapterFinding, Needs, Rule, all_rules, family_of, surveys
from lora_probe.rules.stored import Expected, expect
from lora_probe.rules.subject import Place, Subject


@dataclass(frozen=True)
class Prediction:
    """The ledgers by engine, and the findings by rule without those that follow from another one (`Rule.follows`).
    `not_run` lists rules that could not run, and why."""

    ledgers: Mapping[str, Ledger]
    findings: tuple[tuple[Rule, AdapterFinding], ...]
    not_run: tuple[tuple[Rule, str], ...]


def predict(subject: Subject) -> Prediction:
    """Run every rule, then judge every pair at the stations that files decide, once for each engine."""
    findings: list[tuple[Rule, AdapterFinding]] = []
    not_run: list[tuple[Rule, str]] = []
    # An engine without a predictor has no ledger, and may have rules.
    left_out = predictors().keys() - set(subject.engines)
    for rule, survey in surveys():
        if rule.engines and left_out.issuperset(rule.engines):
            continue
        step(f"running the rule {rule.code} {rule.name}", subject.adapter.path)
        why = _why_not(subject, rule.needs)
        if why:
            not_run.append((rule, why))
        else:
            findings += [(rule, about) for finding in survey(subject) for about in _without(finding, left_out)]
    by_name = spectra_of(subject.adapter)
    spectra = {pair.key: by_name[pair.stored_as] for pair in subject.adapter.modules}
    ledgers = {}
    for engine in subject.engines:
        predictor = predictors()[engine]
        step(f"predicting the ledger of {engine}", subject.adapter.path)
        about = [(rule, finding) for rule, finding in findings if engine in (finding.engines or rule.in_engines)]
        ledgers[engine] = _ledger(subject, predictor, spectra, about)
    causes = {rule.code for rule, _ in findings}
    ledgers = {engine: replace(ledger, rows=_explained(ledger.rows, causes)) for engine, ledger in ledgers.items()}
    reported = tuple((rule, finding) for rule, finding in findings if causes.isdisjoint(rule.follows))
    return Prediction(ledgers, reported, tuple(not_run))


def _without(finding: AdapterFinding, left_out: Set[str]) -> Iterator[AdapterFinding]:
    """The finding without engines that the adapter is not judged for, if it is about others."""
    about = tuple(engine for engine in finding.engines if engine not in left_out)
    if about or not finding.engines:
        yield replace(finding, engines=about)


def _why_not(subject: Subject, needs: Needs) -> str:
    if needs != "files" and subject.base is None:
        return subject.origin.why_not
    if needs == "weights of the base" and not (subject.base is not None and subject.base.shapes):
        return "the base model's weights were not found, or are not safetensors files"
    engine = predictors().get(needs)
    if engine is not None and needs not in subject.views:
        return f"{engine.title}'s modules for this base model are unknown"
    return ""


def _ledger(
    subject: Subject,
    predictor: Predictor,
    spectra: Mapping[Key, Spectrum | None],
    findings: Sequence[tuple[Rule, AdapterFinding]],
) -> Ledger:
    """The ledger of one engine. `findings` is what the rules found for this engine."""
    expected = _expected(subject, predictor.name, spectra)
    places = subject.places.get(predictor.name)
    located = [
        (row, places[row.entry.key] if row.entry is not None and places is not None else None) for row in expected
    ]
    about = [(rule, finding, frozenset(finding.keys)) for rule, finding in findings if finding.value != "ok"]
    rows = []
    for row, place in located:
        stations = _stations(subject, predictor, row, place)
        key = row.entry.key if row.entry is not None else row.key
        for rule, finding, keys in about:
            if key in keys:
                judged = rule.finding(finding.value, finding.message, finding.field)
                stations[finding.station] = worse(stations[finding.station], judged)
        stored_as = row.entry.stored_as if row.entry is not None else None
        engine_as = place.module.engine_as if place is not None and place.module is not None else None
        rows.append(Row(row.key, stations, row.expected_by, stored_as, engine_as))
    refusal = next(_refusals(subject, predictor, located, findings), None)
    if refusal is None:
        return Ledger(predictor.name, tuple(rows), predicted=True)
    code, message = refusal
    return Ledger(predictor.name, tuple(_refused(row) for row in rows), True, message, code, predicted=True)


def _explained(rows: tuple[Row, ...], causes: Set[str]) -> tuple[Row, ...]:
    """The rows with the cause in place of each finding that follows from one of `causes`. Values do not change."""
    rules, result = all_rules(), []
    for row in rows:
        stations = dict(row.stations)
        for station, finding in row.stations.items():
            cause = next((code for code in rules[finding.code].follows if code in causes), "") if finding.code else ""
            if cause:
                stations[station] = Finding(finding.value, cause, f"follows from {rules[cause].name}")
        result.append(replace(row, stations=stations))
    return tuple(result)


def _expected(subject: Subject, engine: str, spectra: Mapping[Key, Spectrum | None]) -> tuple[Expected, ...]:
    """The rows of the ledger, for the modules of the base that the engine has."""
    view, shapes = subject.views.get(engine), subject.shapes
    if view is None or shapes is None:
        return expect(subject.adapter, shapes, {}, spectra)
    base_names = engine_names(view, shapes)
    has = set(base_names.values())
    same = aliases(subject.adapter, shapes, subject.places[engine], base_names)
    return expect(subject.adapter, {name: shape for name, shape in shapes.items() if name in has}, same, spectra)


def _stations(subject: Subject, predictor: Predictor, row: Expected, place: Place | None) -> dict[Station, Finding]:
    if row.entry is None:
        return {"stored": row.stored, "read": Finding("absent"), "placed": Finding("absent")}
    read, placed = predictor.judge(subject, row, place)
    return {"stored": row.stored, "read": read, "placed": placed}


def _refusals(
    subject: Subject,
    predictor: Predictor,
    located: Sequence[tuple[Expected, Place | None]],
    findings: Sequence[tuple[Rule, AdapterFinding]],
) -> Iterator[Refusal]:
    """Why the engine refuses the whole adapter: for the findings of the rules, then for the shapes of a pair."""
    for rule, finding in sorted(findings, key=lambda item: family_of(item[0].code).loading_step):
        if finding.refuses or predictor.name in finding.refused_by:
            yield rule.code, finding.message
    for row, place in located:
        if row.entry is not None and row.entry.parameter == "weight":
            refusal = predictor.refuse(subject, row, place)
            if refusal is not None:
                yield refusal


def _refused(row: Row) -> Row:
    """A row of an adapter that is not loaded: `stored` stays, the other stations are unknown."""
    unknown = Finding("unknown", message="the engine does not load the adapter")
    stations = {station: finding if station == "stored" else unknown for station, finding in row.stations.items()}
    return Row(row.key, stations, row.expected_by, row.stored_as, row.engine_as)
