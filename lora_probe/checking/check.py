"""`check`: what is wrong with an adapter, before anything runs.

In: adapter folders, and the base where it is known. Out: for each a `Report`: the ledger that each engine will come
to, every finding with its rule, and the rules that could not be run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lora_probe.adapter import CONFIG, WEIGHTS, Adapter, find_checkpoint, open_adapter, open_config
from lora_probe.base import EngineView
from lora_probe.checking.bases import Asked, Bases
from lora_probe.checking.renaming import Fix, find_fix
from lora_probe.errors import MissingWeights, NotLora, ProbeError, UnreadableFile
from lora_probe.files import limits
from lora_probe.files.json_object import read_text, top_level
from lora_probe.files.regexes import EndlessPattern
from lora_probe.ledger import Finding, Ledger, Row, clauses
from lora_probe.names import name_modules, ranges
from lora_probe.prediction import Prediction, predict
from lora_probe.rules import ENGINES, Diagnostic, Rule, Severity, all_rules, diagnostic
from lora_probe.rules.lp1_config import config_unreadable, not_lora
from lora_probe.rules.lp2_files import weights_not_found, weights_unreadable
from lora_probe.rules.lp4_serving import MAX_RANKS, engines_differ
from lora_probe.rules.subject import Case, Serving
from lora_probe.rules.vllm_versions import ENGINE_OPTIONS, behaviour

_RANKS: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
CONSEQUENCES = ("LP204", "LP303", "LP410")
"""What mostly follows from another finding is told after it."""
_LINE = re.compile(r"in line (\d+)")
_KEY = re.compile(r"`(\w+)`")


@dataclass(frozen=True)
class NotRun:
    """Rules that had nothing to look at, and why."""

    codes: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Report:
    """What `check` found of one adapter folder. `ledgers` is empty where the files cannot be read at all. `vllm` is the
    version that was predicted for, `ignored` counts findings of rules that were not asked for."""

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
    """What is wrong with one adapter. The options are those of `check_all`, and what it raises."""
    asked = {"model": model, "options": options, "vllm_version": vllm_version, "select": select, "ignore": ignore}
    (report,) = check_all([adapter], **asked)  # type: ignore[arg-type]
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
    """A report for each folder, as they are done; what the engines have for a base is asked once for each base.

    `model` is the base, by default the one that each adapter names, where that is here. `options` are vLLM's flags by
    their names (`max_lora_rank`, `dtype`, `lora_dtype`, `lora_target_modules`; others decide nothing here).
    `select` and `ignore` hold rules' codes, beginnings of codes (`LP2`, `LP2xx`), or names.

    Raises:
        ProbeError: no such folder, base, rule or version of vLLM.
    """
    chosen = selection(select, ignore)
    serving = _serving(options or {}, vllm_version)
    bases = Bases(model, progress)
    for adapter in adapters:
        limits.begin(Path(adapter))
        try:
            folder, notes = find_checkpoint(Path(adapter))
        except UnreadableFile as error:
            if not _holds_weights(Path(adapter)):
                raise
            # Weights without a config are an adapter that no engine loads.
            yield _unreadable(Path(adapter), (), model, error, chosen)
            continue
        progress(f"reading {folder}")
        yield _report(folder, notes, serving, bases, chosen)


def _holds_weights(folder: Path) -> bool:
    try:
        return any(path.name.startswith("adapter_model") for path in folder.iterdir())
    except OSError:
        return False


def fix_for(adapter: str | Path, model: str | None = None, progress: Callable[[str], None] = lambda _: None) -> Fix:
    """What `--fix` would change in one adapter; `model` as in `check_all`.

    Raises:
        ProbeError: the adapter cannot be read, or there is no such base.
    """
    limits.begin(Path(adapter))
    folder, _ = find_checkpoint(Path(adapter))
    opened = open_adapter(folder)
    bases = Bases(model, progress)
    base, _, _ = bases.base(opened)
    views = bases.views(base, _task(opened)).views if base is not None else {}
    return find_fix(opened, Case(opened, _serving({}, None), base, views).shapes)


def selection(select: Sequence[str], ignore: Sequence[str]) -> frozenset[str]:
    """The codes of the rules that are asked for.

    Raises:
        ProbeError: one means no rule.
    """
    # Rules on running engines and on merges are for `trace` and `parity`.
    known = {code: rule for code, rule in all_rules().items() if code < "LP5"}
    wanted = set(known) if not select else {code for word in select for code in _meant(word, known)}
    return frozenset(wanted - {code for word in ignore for code in _meant(word, known)})


def _meant(word: str, known: Mapping[str, Rule]) -> set[str]:
    start = word.upper().rstrip("X")
    found = {code for code, rule in known.items() if rule.name == word.lower()}
    if len(start) > 2:
        found |= {code for code in known if code.startswith(start)}
    if not found:
        near = get_close_matches(word, [*known, *(rule.name for rule in known.values())], 3, 0.5)
        about = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ProbeError(
            f"`check` has no rule `{word}`{about}",
            f"rules: {ranges([int(code[2:]) for code in known])} after LP, beginnings of them (LP2) and names: "
            "`lora-probe rule` lists all",
        )
    return found


def _serving(options: Mapping[str, Any], vllm_version: str | None) -> Serving:
    if unknown := set(options) - set(ENGINE_OPTIONS):
        raise ProbeError(
            f"`{sorted(unknown)[0]}` is no option of vLLM that check knows",
            f"options: {', '.join(sorted(ENGINE_OPTIONS))}",
        )
    rank = options.get("max_lora_rank")
    if rank is not None and rank not in MAX_RANKS:
        raise ProbeError(
            f"vLLM does not take --max-lora-rank {rank}", f"it takes {', '.join(str(one) for one in MAX_RANKS)}"
        )
    targets = options.get("lora_target_modules")
    given = {name: options.get(name) for name in ("max_lora_rank", "dtype", "lora_dtype")}
    return Serving(behaviour(vllm_version), lora_target_modules=tuple(targets) if targets else None, **given)


def _report(folder: Path, notes: tuple[str, ...], serving: Serving, bases: Bases, chosen: frozenset[str]) -> Report:
    try:
        adapter = open_adapter(folder)
        base, name, said = bases.base(adapter)
        asked = bases.views(base, _task(adapter)) if base is not None else Asked()
        adapter = _with_default_targets(adapter, asked.views)
        found = predict(Case(adapter, serving, base, asked.views, asked.missing))
    except UnreadableFile as error:
        return _unreadable(folder, notes, bases.model, error, chosen)
    every = list(_diagnostics(adapter, found))
    diagnostics = [one for one in every if one.code in chosen]
    return Report(
        folder,
        name,
        found.ledgers,
        tuple(sorted(diagnostics, key=lambda one: (_RANKS[one.severity], one.code in CONSEQUENCES, one.code))),
        _not_run(found, chosen),
        (*notes, *said, *asked.notes),
        serving.vllm.version,
        len(every) - len(diagnostics),
    )


def _task(adapter: Adapter) -> str | None:
    task = adapter.config.raw.get("task_type")
    return task if isinstance(task, str) else None


def _with_default_targets(adapter: Adapter, views: Mapping[str, EngineView]) -> Adapter:
    """PEFT has a table of targets by the kind of model, for a config that names none."""
    if adapter.config.target_modules is not None or adapter.config.raw.get("target_parameters"):
        return adapter
    view = views.get("peft")
    targets = view.default_targets if view is not None else ()
    return replace(adapter, config=replace(adapter.config, target_modules=targets or None))


def _unreadable(
    folder: Path, notes: tuple[str, ...], model: str | None, error: UnreadableFile, chosen: frozenset[str]
) -> Report:
    """Files that no engine loads: the error is the finding."""
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
    hint = error.hint or rule.hint
    line = _line(path, error.message) if path.name == CONFIG else None
    found = Diagnostic(rule.code, rule.name, rule.severity, error.message, hint, (), ENGINES, str(path), line)
    # PEFT has other methods than LoRA, and what it makes of their configs is not judged here; vLLM never looks at
    # fields about which modules are meant.
    engines: tuple[str, ...] = () if isinstance(error, NotLora) else ENGINES
    if found.code == "LP101" and PEFTS_OWN & set(_KEY.findall(error.message)):
        engines = ("peft",)
        found = replace(found, engines=engines)
    ledgers = {name: Ledger(name, (), True, error.message, judged.code, predicted=True) for name in engines}
    return Report(folder, model, ledgers, (found,) if found.code in chosen else (), notes=notes)


PEFTS_OWN = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
"""Fields of the config that PEFT alone goes by."""


def _line(path: Path, message: str) -> int | None:
    """The line that an error in a config is about: the one that it names, or that of the key that it names."""
    if match := _LINE.search(message):
        return int(match[1])
    try:
        standing = dict(top_level(read_text(path)))
    except UnreadableFile:
        return None
    return next((standing[key] for key in _KEY.findall(message) if key in standing), None)


def _diagnostics(adapter: Adapter, prediction: Prediction) -> Iterator[Diagnostic]:
    lines = adapter.config.lines
    spoken = set()
    for rule, found in prediction.found:
        spoken.add(rule.code)
        path = adapter.config.path if found.field else adapter.weights.path
        yield diagnostic(rule, found, path, lines.get(found.field) if found.field else None)
    merged: dict[tuple[str, tuple[str, ...]], Diagnostic] = {}
    known = all_rules()
    for engine, ledger in prediction.ledgers.items():
        for sentence, finding, rows in clauses(ledger):
            if finding.value == "unknown" or finding.code in spoken or not finding.code:
                continue
            modules = tuple(row.module for row in rows)
            rule, before = known[finding.code], merged.get((finding.code, modules))
            key = _to_blame(finding, adapter)
            merged[(finding.code, modules)] = Diagnostic(
                rule.code,
                rule.name,
                rule.severity,
                before.message if before else sentence.removesuffix(f" ({finding.code})"),
                rule.hint,
                modules,
                (*(before.engines if before else ()), engine),
                str(adapter.config.path if key else adapter.weights.path),
                lines.get(key) if key else None,
            )
    yield from merged.values()
    yield from _differing(adapter, prediction.ledgers)


def _to_blame(finding: Finding, adapter: Adapter) -> str:
    """The key of the config that a finding on modules is about; empty where it is about the tensors."""
    if finding.code == "LP201":
        return "rank_pattern" if adapter.config.rank_pattern else "r"
    if finding.code == "LP203" and "lora_alpha" in finding.message:
        return "lora_alpha"
    return {"LP106": "target_modules", "LP220": "use_dora"}.get(finding.code, "")


def _differing(adapter: Adapter, ledgers: Mapping[str, Ledger]) -> Iterator[Diagnostic]:
    """LP410: the modules that take effect in one engine and are lost in the other."""
    one, two = (ledgers[engine] for engine in ENGINES)
    if one.refused or two.refused:
        return
    sides: dict[str, list[Row]] = {engine: [] for engine in ENGINES}
    others = {row.key: row for row in two.rows}
    for row in one.rows:
        other = others.get(row.key)
        if other is not None and {row.fate, other.fate} == {"took effect", "lost"}:
            sides["peft" if row.fate == "took effect" else "vllm"].append(row)
    total = len({row.key for row in (*one.rows, *two.rows)})
    rule = all_rules()["LP410"]
    for engine, rows in sides.items():
        if rows:
            modules = tuple(row.module for row in rows)
            name = {"peft": "PEFT", "vllm": "vLLM"}[engine]
            message = engines_differ(len(rows), total, f"take effect in {name} alone ({name_modules(modules)})").message
            path = str(adapter.path)
            yield Diagnostic(rule.code, rule.name, rule.severity, message, rule.hint, modules, ENGINES, path)


def _not_run(prediction: Prediction, chosen: frozenset[str]) -> tuple[NotRun, ...]:
    """The rules that were asked for and had nothing to look at, and the stations that were not decided, by reason."""
    reasons: dict[str, list[str]] = {}
    for rule, why in prediction.not_run:
        if rule.code in chosen:
            reasons.setdefault(why, []).append(rule.code)
    unknown = {
        rule.code for rule in all_rules().values() if rule.needs == "base" and rule.station in ("read", "placed")
    }
    for ledger in prediction.ledgers.values():
        for row in ledger.rows:
            if row.decisive is not None and row.fate == "unknown" and not ledger.refused:
                why = row.decisive[1].message
                reasons.setdefault(why, []).extend(sorted(unknown & chosen))
    return tuple(NotRun(tuple(dict.fromkeys(sorted(codes))), why) for why, codes in reasons.items())
