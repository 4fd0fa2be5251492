"""`check`: what is wrong with an adapter, before anything runs.

In: adapter folders, and the base model if it is known. Out: a `Report` for each: the predicted ledger of each engine,
every finding with its rule, and the rules that could not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lora_probe.adapter import CONFIG, WEIGHTS, Adapter, find_checkpoint, open_adapter, open_config
from lora_probe.checking.bases import Bases, BaseViews
from lora_probe.checking.causes import causes
from lora_probe.checking.renaming import Fix, find_fix
from lora_probe.errors import MissingWeights, NotLora, ProbeError, UnreadableFile
from lora_probe.files import limits
from lora_probe.files.regexes import EndlessPattern
from lora_probe.ledger import Fate, Ledger, clauses
from lora_probe.names import Key, in_words, name_modules
from lora_probe.prediction import Prediction, predict, predictors, subject_of
from lora_probe.rules import Diagnostic, Rule, Severity, all_rules, diagnostic, family_of
from lora_probe.rules.codes import meant, numbers_of
from lora_probe.rules.diagnostics import of_clause, under
from lora_probe.rules.lp1_config import config_unreadable, not_lora
from lora_probe.rules.lp2_files import weights_not_found, weights_unreadable
from lora_probe.rules.lp4_serving import MAX_RANKS, engines_differ
from lora_probe.rules.subject import Serving
from lora_probe.rules.vllm_versions import ENGINE_OPTIONS, behaviour

_RANKS: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class NotRun:
    """Rules that could not run, and why."""

    codes: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Report:
    """The result of `check` for one adapter folder. `ledgers` is empty if the files cannot be read at all. `vllm` is
    the version that the prediction is for; `ignored` counts findings of rules that were not selected."""

    adapter: Path
    model: str | None
    ledgers: Mapping[str, Ledger] = field(repr=False)
    diagnostics: tuple[Diagnostic, ...]
    not_run: tuple[NotRun, ...] = ()
    notes: tuple[str, ...] = field(default=())
    vllm: str = ""
    ignored: int = 0

    def count(self, severity: Severity) -> int:
        return sum(diagnostic.severity == severity for diagnostic in self.diagnostics)

    @property
    def clean(self) -> bool:
        """No error was found."""
        return self.count("error") == 0


def check(
    adapter: str | Path,
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    vllm_version: str | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Report:
    """What is wrong with one adapter. Accepts and raises the same as `check_all`."""
    arguments = {"model": model, "options": options, "vllm_version": vllm_version, "select": select, "ignore": ignore}
    (report,) = check_all([adapter], **arguments)  # type: ignore[arg-type]
    return report


def check_all(
    adapters: Sequence[str | Path],
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    vllm_version: str | None = None,
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Iterator[Report]:
    """A report for each folder, as soon as it is done. Each engine describes each base model only once.

    `model` is the base model; by default each adapter's own base model, if it is on this machine. `options` are vLLM's
    flags by their names (`max_lora_rank`, `dtype`, `lora_dtype`, `lora_target_modules`; others have no effect here).
    `select` and `ignore` contain rule codes, prefixes of codes (`LP2`, `LP2xx`) or rule names.

    Raises:
        ProbeError: there is no such folder, base model or rule, or the version of vLLM is unknown.
    """
    selected = selection(select, ignore)
    serving = _serving(options or {}, vllm_version)
    bases = Bases(model, progress)
    for adapter in adapters:
        limits.begin(Path(adapter))
        try:
            folder, notes = find_checkpoint(Path(adapter))
        except UnreadableFile as error:
            if not _holds_weights(Path(adapter)):
                raise
            # This is an adapter without a config, which no engine loads.
            yield _unreadable(Path(adapter), (), model, error, selected)
            continue
        progress(f"reading {folder}")
        yield _report(folder, notes, serving, bases, selected)


def _holds_weights(folder: Path) -> bool:
    try:
        return any(path.name.startswith("adapter_model") for path in folder.iterdir())
    except OSError:
        return False


def fix_for(adapter: str | Path, model: str | None = None, progress: Callable[[str], None] = lambda _: None) -> Fix:
    """What `--fix` would change in one adapter; `model` as in `check_all`.

    Raises:
        ProbeError: the adapter cannot be read, or there is no such base model.
    """
    limits.begin(Path(adapter))
    folder, _ = find_checkpoint(Path(adapter))
    opened = open_adapter(folder)
    bases = Bases(model, progress)
    base, _, _ = bases.base(opened)
    views = bases.views(base, _task(opened)).views if base is not None else {}
    return find_fix(opened, subject_of(opened, _serving({}, None), base, views).shapes)


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
        near = get_close_matches(word, [*rules, *(rule.name for rule in rules.values())], 3, 0.5)
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ProbeError(
            f"`check` has no rule `{word}`{suggestion}",
            "expected a rule code (LP204), a prefix (LP2) or a rule name; "
            f"`check` has {numbers_of(rules)}, and `lora-probe rule` lists all rules",
        )
    return codes


def _serving(options: Mapping[str, Any], vllm_version: str | None) -> Serving:
    if unknown := set(options) - set(ENGINE_OPTIONS):
        raise ProbeError(
            f"unknown vLLM option `{sorted(unknown)[0]}`",
            f"known options: {', '.join(sorted(ENGINE_OPTIONS))}",
        )
    rank = options.get("max_lora_rank")
    if rank is not None and rank not in MAX_RANKS:
        raise ProbeError(f"vLLM does not accept --max-lora-rank {rank}", f"accepted: {', '.join(map(str, MAX_RANKS))}")
    targets = options.get("lora_target_modules")
    settings = {name: options.get(name) for name in ("max_lora_rank", "dtype", "lora_dtype")}
    return Serving(behaviour(vllm_version), lora_target_modules=tuple(targets) if targets else None, **settings)


def _report(folder: Path, notes: tuple[str, ...], serving: Serving, bases: Bases, selected: frozenset[str]) -> Report:
    try:
        adapter = open_adapter(folder)
        base, name, base_notes = bases.base(adapter)
        described = bases.views(base, _task(adapter)) if base is not None else BaseViews()
        subject = subject_of(adapter, serving, base, described.views, described.missing)
        prediction = predict(subject)
    except UnreadableFile as error:
        return _unreadable(folder, notes, bases.model, error, selected)
    every = list(_diagnostics(subject.adapter, prediction))
    # A cause that is not selected does not replace its consequences.
    diagnostics = causes([d for d in every if d.code in selected], prediction.ledgers.values())
    rules = all_rules()
    return Report(
        folder,
        name,
        prediction.ledgers,
        tuple(sorted(diagnostics, key=lambda d: (_RANKS[d.severity], rules[d.code].consequence, d.code))),
        _not_run(prediction, selected),
        (*notes, *base_notes, *described.notes),
        serving.vllm.version,
        sum(diagnostic.code not in selected for diagnostic in every),
    )


def _task(adapter: Adapter) -> str | None:
    task = adapter.config.raw.get("task_type")
    return task if isinstance(task, str) else None


def _unreadable(
    folder: Path, notes: tuple[str, ...], model: str | None, error: UnreadableFile, selected: frozenset[str]
) -> Report:
    """The report on files that no engine loads: the error is the only finding."""
    path = folder / CONFIG
    if isinstance(error, NotLora):
        judged = not_lora(error.message)
    elif isinstance(error, MissingWeights):
        judged = weights_not_found(error.message)
    elif isinstance(error, EndlessPattern):
        judged = config_unreadable(error.message)
    else:
        try:
            open_config(path)
        except UnreadableFile:
            judged = config_unreadable(error.message)
        else:
            path, judged = folder / WEIGHTS, weights_unreadable(error.message)
    rule = all_rules()[judged.code]
    engines = tuple(name for name, predictor in predictors().items() if error.key not in predictor.ignored_fields)
    diagnostic = under(rule, error.message, (), engines, str(path), error.line, hint=error.hint)
    # PEFT supports other methods than LoRA, so it may load this adapter; that is not checked.
    refusing = () if isinstance(error, NotLora) else engines
    ledgers = {name: Ledger(name, (), True, error.message, judged.code, predicted=True) for name in refusing}
    return Report(folder, model, ledgers, (diagnostic,) if rule.code in selected else (), notes=notes)


def _diagnostics(adapter: Adapter, prediction: Prediction) -> Iterator[Diagnostic]:
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
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (module, _, _), of_module in fates.items():
        having, losing = (
            tuple(engine for engine, fate in of_module.items() if fate == wanted) for wanted in ("took effect", "lost")
        )
        if having and losing:
            groups.setdefault((having, losing), []).append(module)
    order = list(ledgers)
    rule = all_rules()["LP410"]
    for (having, losing), modules in sorted(
        groups.items(), key=lambda item: [order.index(name) for name in item[0][0]]
    ):
        engines = tuple(sorted((*having, *losing), key=order.index))
        message = engines_differ(_titles(engines), len(modules), len(fates), _only_in(having, losing, modules)).message
        yield under(rule, message, tuple(modules), engines, str(adapter.path), names_modules=True)


def _only_in(having: tuple[str, ...], losing: tuple[str, ...], modules: Sequence[str]) -> str:
    """In which engines modules take effect and in which they do not, by the titles of the engines."""
    two = len(having) == len(losing) == 1
    where = f"{_titles(having)} alone" if two else f"{_titles(having)} and are lost in {_titles(losing)}"
    return f"take effect in {where} ({name_modules(modules)})"


def _titles(engines: Sequence[str]) -> str:
    return in_words([predictors()[engine].title for engine in engines])


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
