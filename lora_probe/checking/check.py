"""`check`: what is wrong with an adapter, before anything runs.

In: adapter folders, and the base model if it is known. Out: a `Report` for each: the predicted ledger of each engine,
every finding with its rule, and the rules that could not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_probe.adapter import Adapter, find_checkpoint, located, open_adapter
from lora_probe.checking.bases import Bases, BaseViews
from lora_probe.checking.causes import causes
from lora_probe.checking.diagnosing import diagnostics_of
from lora_probe.checking.renaming import Fix, find_fix
from lora_probe.checking.report import NotRun, Report
from lora_probe.checking.unreadable import holds_weights, unreadable
from lora_probe.errors import ProbeError, UnreadableFile, words_of
from lora_probe.files import limits
from lora_probe.ledger import Ledger
from lora_probe.names import Universe, name_modules, path_of
from lora_probe.prediction import Prediction, predict, predictors, subject_of
from lora_probe.rules import Diagnostic, Rule, Severity, all_rules, family_of
from lora_probe.rules.codes import meant, numbers_of, suggestion
from lora_probe.rules.lp4_serving import MAX_RANKS
from lora_probe.rules.subject import Serving, Subject
from lora_probe.rules.vllm_versions import ENGINE_OPTIONS, behaviour, note_on

_RANKS: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}


def check(
    adapter: str | Path,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    vllm_version: str | None = None,
    select: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    engines: str | Sequence[str] = (),
) -> Report:
    """What is wrong with one adapter. Accepts and raises the same as `check_all`."""
    (report,) = check_all(
        [adapter],
        model=model,
        options=options,
        vllm_version=vllm_version,
        select=select,
        ignore=ignore,
        engines=engines,
    )
    return report


def check_all(
    adapters: Sequence[str | Path],
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    vllm_version: str | None = None,
    select: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    engines: str | Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Report]:
    """A report for each folder, as soon as it is done. Each engine describes each base model only once.

    `model` is the base model; by default each adapter's own base model, if it is on this machine. `options` are vLLM's
    flags by their names (`max_lora_rank`, `dtype`, `lora_dtype`, `lora_target_modules`; others have no effect here).
    `select` and `ignore` contain rule codes, prefixes of codes (`LP2`, `LP2xx`) or rule names. `engines` are those that
    the adapters are judged for; by default all that serve the model that an adapter was trained on.

    Raises:
        ProbeError: there is no such folder, base model, rule or engine, or the version of vLLM is unknown.
    """
    selected = selection(words_of("select", select), words_of("ignore", ignore))
    serving = serving_of(options or {}, vllm_version)
    engines = words_of("engines", engines)
    for engine in engines:
        if engine not in predictors():
            raise ProbeError(f"unknown engine `{engine}`", f"engines: {', '.join(predictors())}")
    bases = Bases(model, progress, engines)
    newer = note_on(vllm_version)
    for adapter in adapters:
        limits.begin(located(Path(adapter)))
        try:
            folder, notes = find_checkpoint(Path(adapter))
        except UnreadableFile as error:
            if not holds_weights(Path(adapter)):
                raise
            # This is an adapter without a config, which no engine loads.
            yield unreadable(Path(adapter), (), model, error, selected)
            continue
        progress(f"reading {folder}")
        notes = (*notes, newer) if newer else notes
        yield _report(folder, notes, serving, bases, selected, engines)


def fix_for(adapter: str | Path, model: str | None = None, progress: Callable[[str], None] = lambda _: None) -> Fix:
    """What `--fix` would change in one adapter; `model` as in `check_all`.

    Raises:
        ProbeError: the adapter cannot be read, or there is no such base model.
    """
    limits.begin(located(Path(adapter)))
    folder, _ = find_checkpoint(Path(adapter))
    opened = open_adapter(folder)
    bases = Bases(model, progress)
    base = bases.base(opened).base
    views = bases.views(base, opened.config.trained_as).views if base is not None else {}
    return find_fix(opened, subject_of(opened, serving_of({}, None), base, views).shapes)


def selection(select: Sequence[str], ignore: Sequence[str]) -> frozenset[str]:
    """The codes of the selected rules.

    Raises:
        ProbeError: a word does not match any rule.
    """
    rules = {code: rule for code, rule in all_rules().items() if family_of(code).in_check}
    selected = set(rules) if not select else {code for word in select for code in _codes_of(word, rules)}
    return frozenset(selected - {code for word in ignore for code in _codes_of(word, rules)})


def _codes_of(word: str, rules: Mapping[str, Rule]) -> list[str]:
    codes = meant(word, rules)
    if not codes:
        raise ProbeError(
            f"`check` has no rule `{word}`{suggestion(word, rules)}",
            "expected a rule code (LP204), a prefix (LP2) or a rule name; "
            f"`check` has {numbers_of(rules)}, and `lora-probe rule` lists all rules",
        )
    return codes


def serving_of(options: Mapping[str, Any], vllm_version: str | None) -> Serving:
    """vLLM's flags, checked.

    Raises:
        ProbeError: vLLM has no such flag, or does not accept the value.
    """
    if unknown := set(options) - set(ENGINE_OPTIONS):
        raise ProbeError(
            f"unknown vLLM option `{sorted(unknown)[0]}`",
            f"known options: {', '.join(sorted(ENGINE_OPTIONS))}",
        )
    rank = options.get("max_lora_rank")
    if rank is not None and rank not in MAX_RANKS:
        raise ProbeError(f"vLLM does not accept --max-lora-rank {rank}", f"accepted: {', '.join(map(str, MAX_RANKS))}")
    for name in ("max_loras", "tensor_parallel_size"):
        count = options.get(name)
        if count is not None and count < 1:
            raise ProbeError(f"--{name.replace('_', '-')} is {count}", "pass 1 or more")
    targets = words_of("lora_target_modules", options.get("lora_target_modules"))
    settings = {name: options.get(name) for name in ("max_lora_rank", "dtype", "lora_dtype")}
    return Serving(behaviour(vllm_version), lora_target_modules=tuple(targets) if targets else None, **settings)


def _report(
    folder: Path,
    notes: tuple[str, ...],
    serving: Serving,
    bases: Bases,
    selected: frozenset[str],
    engines: Sequence[str],
) -> Report:
    try:
        adapter = open_adapter(folder)
        found = bases.base(adapter)
        described = bases.views(found.base, adapter.config.trained_as) if found.base is not None else BaseViews()
        not_served = {} if engines else _not_served(adapter, described)
        judged = [name for name in predictors() if name not in not_served and (not engines or name in engines)]
        subject = subject_of(adapter, serving, found.base, described.views, described.missing, found.origin, judged)
        prediction = _named(predict(subject), subject)
    except UnreadableFile as error:
        return unreadable(folder, notes, bases.model, error, selected)
    every = list(diagnostics_of(subject.adapter, prediction))
    # A cause that is not selected does not replace its consequences.
    chosen = [diagnostic for diagnostic in every if diagnostic.code in selected]
    ledgers = prediction.ledgers
    diagnostics = [_about(diagnostic, ledgers) for diagnostic in causes(chosen, ledgers.values())]
    rules = all_rules()
    return Report(
        folder,
        found.name,
        prediction.ledgers,
        tuple(sorted(diagnostics, key=lambda d: (_RANKS[d.severity], rules[d.code].consequence, d.code))),
        _not_run(prediction, selected),
        (*notes, *subject.adapter.notes, *found.notes, *described.notes),
        serving.vllm.version,
        sum(diagnostic.code not in selected for diagnostic in every),
        not_served,
    )


def _not_served(adapter: Adapter, described: BaseViews) -> dict[str, str]:
    """The engines that do not serve the model that the adapter was trained on, each with why."""
    reasons = {
        name: predictor.not_served(adapter.config.trained_as, described.views)
        for name, predictor in predictors().items()
    }
    return {name: why for name, why in reasons.items() if why}


def _named(prediction: Prediction, subject: Subject) -> Prediction:
    """The prediction, with ledgers that name modules as shortly as no other module of the adapter or of the base is
    named."""
    keys = (row.key for ledger in prediction.ledgers.values() for row in ledger.rows)
    universe = Universe(tuple(dict.fromkeys((*map(path_of, keys), *(subject.shapes or ())))))
    ledgers = {engine: replace(ledger, universe=universe) for engine, ledger in prediction.ledgers.items()}
    return replace(prediction, ledgers=ledgers)


def _about(diagnostic: Diagnostic, ledgers: Mapping[str, Ledger]) -> Diagnostic:
    """The diagnostic with the short names of its modules, unless its message contains them."""
    if diagnostic.names_modules or not diagnostic.modules:
        return diagnostic
    universe = next((ledger.names for ledger in ledgers.values()), None)
    return replace(diagnostic, about=name_modules(diagnostic.modules, universe))


def _not_run(prediction: Prediction, selected: frozenset[str]) -> tuple[NotRun, ...]:
    """The selected rules that could not run, and the stations that could not be judged, by reason."""
    reasons: dict[str, list[str]] = {}
    for rule, why in prediction.not_run:
        if rule.code in selected:
            reasons.setdefault(why, []).append(rule.code)
    unknown = {
        rule.code for rule in all_rules().values() if rule.needs == "base" and rule.station in ("read", "placed")
    }
    for ledger in prediction.ledgers.values():
        for row in ledger.rows:
            if row.decisive is not None and row.fate == "unknown" and not ledger.refused:
                why = row.decisive[1].message
                reasons.setdefault(why, []).extend(sorted(unknown & selected))
    return tuple(NotRun(tuple(dict.fromkeys(sorted(codes))), why) for why, codes in reasons.items())
