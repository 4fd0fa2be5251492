"""The ledger that an engine will come to, predicted from files: `stored`, `read` and `placed` of every module.

In: a `Subject`. Out: for each engine a `Ledger` as `trace` would measure it there, with the reason for every module
that will not take effect, and what the rules on the whole adapter found. PEFT decides from adapter_config.json
(`inject_adapter`, `set_peft_model_state_dict`), vLLM from the names of the tensors (`LoRAModel.from_local_checkpoint`,
`LoRAModelManager.activate_adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_probe.adapter import adapter_in
from lora_probe.adapter.spectrum import Spectrum, pair_spectrum
from lora_probe.files.limits import step
from lora_probe.ledger import OK, Finding, Ledger, Row, Station, graver
from lora_probe.names import PREFIX, Key
from lora_probe.rules import ENGINES, AdapterFinding, Needs, Rule, family_of, surveys
from lora_probe.rules.lp1_targets import not_targeted
from lora_probe.rules.lp2_names import doubled_prefix, odd_ending, prefix_missing, wrapper_in_name
from lora_probe.rules.lp2_weights import half_missing
from lora_probe.rules.lp3_names import no_lora_layer_there, no_such_module, other_class, skipped
from lora_probe.rules.lp4_serving import MAX_RANKS, outside_filter
from lora_probe.rules.paths import starts, wrapper_words
from lora_probe.rules.stored import Expected, expect
from lora_probe.rules.subject import Place, Subject

BASE_UNKNOWN = Finding("unknown", message="the base is not known")
VIEW_UNKNOWN = Finding("unknown", message="what the engine has for this base is not known")
LAYERS_COPIED = Finding("unknown", message="PEFT copies layers (layer_replication), which is not predicted")
EXPERTS_CONVERTED = Finding("unknown", message="PEFT converts the names of experts on load, which is not predicted")


@dataclass(frozen=True)
class Prediction:
    """What was found: by rule, and in the end by engine. `not_run` are the rules that had nothing to look at."""

    ledgers: Mapping[str, Ledger]
    findings: tuple[tuple[Rule, AdapterFinding], ...]
    not_run: tuple[tuple[Rule, str], ...]


def predict(subject: Subject) -> Prediction:
    """Ask every rule, and take every pair through the stations that files decide, once for each engine."""
    findings: list[tuple[Rule, AdapterFinding]] = []
    not_run: list[tuple[Rule, str]] = []
    for rule, judge in surveys():
        step(f"asking the rule {rule.code} {rule.name}", subject.adapter.path)
        why = _why_not(subject, rule.needs)
        if why:
            not_run.append((rule, why))
        else:
            findings += [(rule, finding) for finding in judge(subject)]
    spectra = {pair.key: pair_spectrum(subject.adapter, pair) for pair in subject.adapter.modules}
    ledgers = {}
    for engine in ENGINES:
        step(f"predicting the ledger of {engine}", subject.adapter.path)
        ledgers[engine] = _ledger(subject, engine, spectra, findings)
    return Prediction(ledgers, tuple(findings), tuple(not_run))


def _why_not(subject: Subject, needs: Needs) -> str:
    if needs != "files" and subject.base is None:
        return "the base is not known"
    if needs == "weights of the base" and not (subject.base is not None and subject.base.shapes):
        return "the base's weights are not here, or not in safetensors files"
    if needs == "vllm" and "vllm" not in subject.views:
        return "what vLLM has for this base is not known"
    return ""


def _ledger(
    subject: Subject,
    engine: str,
    spectra: Mapping[Key, Spectrum | None],
    findings: Sequence[tuple[Rule, AdapterFinding]],
) -> Ledger:
    view = subject.views.get(engine)
    shapes, aliases = subject.shapes, {}
    if view is not None and shapes is not None:
        has = set(subject.homes[engine].values())
        shapes = {name: shape for name, shape in shapes.items() if name in has}
        aliases = subject.aliases(engine)
    expected = expect(subject.adapter, shapes, aliases, spectra)
    judge = _peft if engine == "peft" else _vllm
    of_modules = [
        (rule, finding, frozenset(finding.keys))
        for rule, finding in findings
        if finding.value != "ok" and engine in (finding.engines or rule.engines)
    ]
    rows = []
    for row in expected:
        place = subject.places[engine][row.entry.key] if row.entry is not None and view is not None else None
        read, placed = judge(subject, row, place) if row.entry is not None else (Finding("absent"), Finding("absent"))
        stations: dict[Station, Finding] = {"stored": row.stored, "read": read, "placed": placed}
        key = row.entry.key if row.entry is not None else row.key
        for rule, finding, keys in of_modules:
            if key in keys:
                of_rule = rule.finding(finding.value, finding.message, finding.field)
                stations[finding.station] = graver(stations[finding.station], of_rule)
        stored_as = row.entry.stored_as if row.entry is not None else None
        engine_as = place.module.engine_as if place is not None and place.module is not None else None
        rows.append(Row(row.key, stations, row.expected_by, stored_as, engine_as))
    refusals = [
        (rule.code, finding.message)
        for rule, finding in sorted(findings, key=lambda item: family_of(item[0].code).loading_step)
        if finding.refuses and engine in (finding.engines or rule.engines)
    ]
    refusals += _shape_refusals(subject, engine, expected)
    if not refusals:
        return Ledger(engine, tuple(rows), predicted=True)
    code, message = refusals[0]
    return Ledger(engine, tuple(_refused(row) for row in rows), True, message, code, predicted=True)


def _refused(row: Row) -> Row:
    """A row of an adapter that is not loaded: what the file shows stays, the rest nobody knows."""
    unknown = Finding("unknown", message="the engine does not load the adapter")
    stations = {station: finding if station == "stored" else unknown for station, finding in row.stations.items()}
    return Row(row.key, stations, row.expected_by, row.stored_as, row.engine_as)


def _peft(subject: Subject, row: Expected, place: Place | None) -> tuple[Finding, Finding]:
    """`read` and `placed` in PEFT: the name as it stands, and whether the config targets the module."""
    assert row.entry is not None
    gone = Finding("absent")
    half = row.entry.a or row.entry.b
    assert half is not None
    stored = half.name
    named = wrapper_in_name(wrapper_words(stored)) if place is None or place.module is None else None
    named = named or (prefix_missing(stored, PREFIX) if place is None or place.dropped else None)
    named = named or doubled_prefix(stored.removeprefix(PREFIX))
    if named is not None:
        return named, gone
    targeted = bool(subject.adapter.config.targeted([row.module])) or row.entry.parameter != "weight"
    if place is None:
        return OK, _unknown(subject) if targeted else not_targeted()
    if place.module is None and ".experts." in f"{row.entry.module}." and subject.views["peft"].parameters:
        return EXPERTS_CONVERTED, EXPERTS_CONVERTED
    if place.module is None and subject.adapter.config.raw.get("layer_replication"):
        return LAYERS_COPIED, LAYERS_COPIED
    if place.module is None:
        return _homeless(row, "peft", subject), gone
    if (ending := odd_ending(half.name, place.module.kind == "embedding", adapter_in(half))) is not None:
        return ending, gone
    if not targeted:
        return OK, not_targeted()
    # A parameter is adapted whatever kind of module it belongs to.
    adaptable = not place.module.why_not or subject.adapter.config.targets_parameter(f"{row.module}.weight")
    return OK, OK if adaptable else no_lora_layer_there(place.module.why_not)


def _unknown(subject: Subject) -> Finding:
    return BASE_UNKNOWN if subject.base is None else VIEW_UNKNOWN


def _vllm(subject: Subject, row: Expected, place: Place | None) -> tuple[Finding, Finding]:
    """`read` and `placed` in vLLM: the name after its own renaming, and whether the layer is one that it wraps."""
    assert row.entry is not None
    gone = Finding("absent")
    stored = (row.entry.a or row.entry.b).name  # type: ignore[union-attr]
    if place is None:
        named = wrapper_in_name(wrapper_words(stored))
        return (named, gone) if named is not None else (OK, _unknown(subject))
    if place.dropped:
        return skipped(place.dropped), gone
    if place.module is None:
        return wrapper_in_name(wrapper_words(stored)) or _homeless(row, "vllm", subject), gone
    if place.module.why_not:
        return OK, no_lora_layer_there(place.module.why_not)
    targets = subject.serving.lora_target_modules
    if targets is not None and not _passes(place, targets):
        return OK, outside_filter(targets)
    if place.module.packed and (missing := half_missing(row.entry)) is not None:
        # A packed layer is filled without the half, so nothing is added; vLLM says nothing.
        return OK, replace(missing, value="absent")
    return OK, OK


def _homeless(row: Expected, engine: str, subject: Subject) -> Finding:
    assert row.entry is not None
    if row.homeless and row.module != row.entry.module:
        return other_class(*starts(row.entry.stored_as, row.module))
    return no_such_module(subject.views[engine].model)


def _passes(place: Place, targets: tuple[str, ...]) -> bool:
    """vLLM's `is_in_target_modules`: the last word or the whole name, of the packed layer or of its parts."""
    assert place.name is not None
    assert place.module is not None
    layer = place.module.engine_as.partition("[")[0]
    names = {place.name, place.name.rpartition(".")[2], layer, layer.rpartition(".")[2]}
    if names & set(targets):
        return True
    # One named part of a packed layer wraps the whole layer.
    return place.module.packed and any(
        target in parts for target in targets for parts in PACKED if place.name.rpartition(".")[2] in parts
    )


PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def _shape_refusals(subject: Subject, engine: str, expected: Sequence[Expected]) -> list[tuple[str, str]]:
    """Tensors that the engine cannot copy into its layers: PEFT wants the very shape, vLLM one that is not larger."""
    refusals = []
    for row in expected:
        pair = row.entry
        place = subject.places[engine][pair.key] if pair is not None and engine in subject.places else None
        if pair is None or pair.parameter != "weight":
            continue
        if place is None:
            # Without a base only the ranks can be held against each other.
            if engine == "peft" and row.stored.code in ("LP201", "LP206") and pair.a is not None:
                refusals.append((row.stored.code, f"size mismatch: {row.stored.message}"))
            continue
        if place.module is None or place.module.why_not:
            continue
        shape = place.module.shape
        if shape is None:
            continue
        turned = pair.embedding or (engine == "vllm" and place.module.kind == "embedding")
        wide, tall = (shape[0], shape[1]) if turned else (shape[1], shape[0])
        if engine == "peft":
            if subject.adapter.config.targeted([row.module]):
                rank = subject.adapter.config.rank_of(row.module)
                refusals += _mismatch(row, {"a": (rank, wide), "b": (tall, rank)})
        elif not (subject.serving.lora_target_modules and not _passes(place, subject.serving.lora_target_modules)):
            refusals += _vllm_slot(subject, row, place, wide, tall)
    return refusals[:1]


def _mismatch(row: Expected, wanted: Mapping[str, tuple[int, int]]) -> list[tuple[str, str]]:
    assert row.entry is not None
    for half, tensor in (("a", row.entry.a), ("b", row.entry.b)):
        if tensor is not None and tensor.shape != wanted[half]:
            code = row.stored.code or "LP301"
            return [
                (
                    code,
                    f"size mismatch for `{tensor.name}`: {list(tensor.shape)} in the file, "
                    f"{list(wanted[half])} in the model",
                )
            ]
    return []


def _vllm_slot(subject: Subject, row: Expected, place: Place, wide: int, tall: int) -> list[tuple[str, str]]:
    """Why vLLM dies while it fills the slot (`set_lora`, `optimize`), if it does."""
    pair = row.entry
    assert pair is not None
    assert place.module is not None
    limit = subject.serving.max_lora_rank or MAX_RANKS[-1]
    missing = half_missing(pair)
    if missing is not None and (not place.module.packed or (pair.b is None and pair.scaling != 1)):
        return [(missing.code, f"`{pair.stored_as}`: {missing.message}")]
    for tensor, most in ((pair.a, (limit, wide)), (pair.b, (tall, limit))):
        if tensor is None:
            continue
        if len(tensor.shape) != 2:
            return [("LP206", f"`{tensor.name}` has the shape {list(tensor.shape)}, not that of a matrix")]
        if tensor.shape[0] > most[0] or tensor.shape[1] > most[1]:
            code = row.stored.code or "LP301"
            return [(code, f"`{tensor.name}` is {list(tensor.shape)}, and the layer takes at most {list(most)}")]
    return []
