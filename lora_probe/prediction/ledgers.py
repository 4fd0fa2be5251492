"""The ledger that an engine will come to, predicted from files: `stored`, `read` and `placed` of every module.

In: a `Case`. Out: for each engine a `Ledger` as `trace` would measure it there, with the reason for every module that
will not take effect, and what the rules on the whole adapter found. PEFT decides from adapter_config.json
(`inject_adapter`, `set_peft_model_state_dict`), vLLM from the names of the tensors (`LoRAModel.from_local_checkpoint`,
`LoRAModelManager.activate_adapter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_probe.adapter import adapter_in
from lora_probe.adapter.spectrum import Spectrum, pair_spectrum
from lora_probe.files.limits import step
from lora_probe.ledger import OK, Finding, Ledger, Row, Station, worse
from lora_probe.names import PREFIX, Key
from lora_probe.rules import ENGINES, Found, Needs, Rule, surveys
from lora_probe.rules.lp1_config import not_targeted
from lora_probe.rules.lp2_names import (
    doubled_prefix,
    no_lora_layer_there,
    no_such_module,
    odd_ending,
    other_class,
    prefix_missing,
    skipped,
    starts,
    wrapper_in_name,
    wrapper_words,
)
from lora_probe.rules.lp2_weights import half_missing
from lora_probe.rules.lp4_serving import MAX_RANKS, outside_filter
from lora_probe.rules.stored import Expected, expect
from lora_probe.rules.subject import Case, Place

BASE_UNKNOWN = Finding("unknown", message="the base is not known")
VIEW_UNKNOWN = Finding("unknown", message="what the engine has for this base is not known")
LAYERS_COPIED = Finding("unknown", message="PEFT copies layers (layer_replication), which is not predicted")
EXPERTS_CONVERTED = Finding("unknown", message="PEFT converts the names of experts on load, which is not predicted")


@dataclass(frozen=True)
class Prediction:
    """What was found: by rule, and in the end by engine. `not_run` are the rules that had nothing to look at."""

    ledgers: Mapping[str, Ledger]
    found: tuple[tuple[Rule, Found], ...]
    not_run: tuple[tuple[Rule, str], ...]


def predict(case: Case) -> Prediction:
    """Ask every rule, and take every pair through the stations that files decide, once for each engine."""
    found: list[tuple[Rule, Found]] = []
    not_run: list[tuple[Rule, str]] = []
    for rule, judge in surveys():
        step(f"asking the rule {rule.code} {rule.name}", case.adapter.path)
        why = _why_not(case, rule.needs)
        if why:
            not_run.append((rule, why))
        else:
            found += [(rule, one) for one in judge(case)]
    spectra = {pair.key: pair_spectrum(case.adapter, pair) for pair in case.adapter.modules}
    ledgers = {}
    for engine in ENGINES:
        step(f"predicting the ledger of {engine}", case.adapter.path)
        ledgers[engine] = _ledger(case, engine, spectra, found)
    return Prediction(ledgers, tuple(found), tuple(not_run))


def _why_not(case: Case, needs: Needs) -> str:
    if needs != "files" and case.base is None:
        return "the base is not known"
    if needs == "weights of the base" and not (case.base is not None and case.base.shapes):
        return "the base's weights are not here, or not in safetensors files"
    if needs == "vllm" and "vllm" not in case.views:
        return "what vLLM has for this base is not known"
    return ""


def _ledger(
    case: Case, engine: str, spectra: Mapping[Key, Spectrum | None], found: Sequence[tuple[Rule, Found]]
) -> Ledger:
    view = case.views.get(engine)
    shapes, aliases = case.shapes, {}
    if view is not None and shapes is not None:
        has = set(case.homes[engine].values())
        shapes = {name: shape for name, shape in shapes.items() if name in has}
        aliases = case.aliases(engine)
    expected = expect(case.adapter, shapes, aliases, spectra)
    judge = _peft if engine == "peft" else _vllm
    mine = [
        (rule, one, frozenset(one.keys))
        for rule, one in found
        if one.value != "ok" and engine in (one.engines or rule.engines)
    ]
    rows = []
    for row in expected:
        place = case.places[engine][row.entry.key] if row.entry is not None and view is not None else None
        read, placed = judge(case, row, place) if row.entry is not None else (Finding("absent"), Finding("absent"))
        stations: dict[Station, Finding] = {"stored": row.stored, "read": read, "placed": placed}
        key = row.entry.key if row.entry is not None else row.key
        for rule, one, keys in mine:
            if key in keys:
                stations[one.station] = worse(stations[one.station], Finding(one.value, rule.code, one.message))
        stored_as = row.entry.stored_as if row.entry is not None else None
        engine_as = place.module.engine_as if place is not None and place.module is not None else None
        rows.append(Row(row.key, stations, row.expected_by, stored_as, engine_as))
    refusals = [
        (rule.code, one.message)
        for rule, one in sorted(found, key=lambda item: _ORDER.get(item[0].code[:3], 9))
        if one.refuses and engine in (one.engines or rule.engines)
    ]
    refusals += _shape_refusals(case, engine, expected)
    if not refusals:
        return Ledger(engine, tuple(rows), predicted=True)
    code, message = refusals[0]
    return Ledger(engine, tuple(_refused(row) for row in rows), True, message, code, predicted=True)


_ORDER = {"LP1": 0, "LP4": 1, "LP2": 2, "LP3": 3}
"""Which refusal comes first: engines read the config before the tensors."""


def _refused(row: Row) -> Row:
    """A row of an adapter that is not loaded: what the file shows stays, the rest nobody knows."""
    unknown = Finding("unknown", message="the engine does not load the adapter")
    stations = {station: finding if station == "stored" else unknown for station, finding in row.stations.items()}
    return Row(row.key, stations, row.expected_by, row.stored_as, row.engine_as)


def _peft(case: Case, row: Expected, place: Place | None) -> tuple[Finding, Finding]:
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
    targeted = bool(case.adapter.config.targeted([row.module])) or row.entry.parameter != "weight"
    if place is None:
        return OK, _unknown(case) if targeted else not_targeted()
    if place.module is None and ".experts." in f"{row.entry.module}." and case.views["peft"].parameters:
        return EXPERTS_CONVERTED, EXPERTS_CONVERTED
    if place.module is None and case.adapter.config.raw.get("layer_replication"):
        return LAYERS_COPIED, LAYERS_COPIED
    if place.module is None:
        return _homeless(row, "peft", case), gone
    if (ending := odd_ending(half.name, place.module.kind == "embedding", adapter_in(half))) is not None:
        return ending, gone
    if not targeted:
        return OK, not_targeted()
    # A parameter is adapted whatever kind of module it belongs to.
    adaptable = not place.module.why_not or case.adapter.config.targets_parameter(f"{row.module}.weight")
    return OK, OK if adaptable else no_lora_layer_there(place.module.why_not)


def _unknown(case: Case) -> Finding:
    return BASE_UNKNOWN if case.base is None else VIEW_UNKNOWN


def _vllm(case: Case, row: Expected, place: Place | None) -> tuple[Finding, Finding]:
    """`read` and `placed` in vLLM: the name after its own renaming, and whether the layer is one that it wraps."""
    assert row.entry is not None
    gone = Finding("absent")
    stored = (row.entry.a or row.entry.b).name  # type: ignore[union-attr]
    if place is None:
        named = wrapper_in_name(wrapper_words(stored))
        return (named, gone) if named is not None else (OK, _unknown(case))
    if place.dropped:
        return skipped(place.dropped), gone
    if place.module is None:
        return wrapper_in_name(wrapper_words(stored)) or _homeless(row, "vllm", case), gone
    if place.module.why_not:
        return OK, no_lora_layer_there(place.module.why_not)
    targets = case.serving.lora_target_modules
    if targets is not None and not _passes(place, targets):
        return OK, outside_filter(targets)
    if place.module.packed and (missing := half_missing(row.entry)) is not None:
        # A packed layer is filled without the half, so nothing is added; vLLM says nothing.
        return OK, Finding("absent", missing.code, missing.message)
    return OK, OK


def _homeless(row: Expected, engine: str, case: Case) -> Finding:
    assert row.entry is not None
    if row.homeless and row.module != row.entry.module:
        return other_class(*starts(row.entry.stored_as, row.module))
    return no_such_module(case.views[engine].model)


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
        target in parts for target in targets for parts in PARTS_OF_ONE_LAYER if place.name.rpartition(".")[2] in parts
    )


PARTS_OF_ONE_LAYER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Projections that vLLM holds in one layer: a filter that names one of them lets the whole layer pass."""


def _shape_refusals(case: Case, engine: str, expected: Sequence[Expected]) -> list[tuple[str, str]]:
    """Tensors that the engine cannot copy into its layers: PEFT wants the very shape, vLLM one that is not larger."""
    refusals = []
    for row in expected:
        pair = row.entry
        place = case.places[engine][pair.key] if pair is not None and engine in case.places else None
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
            if case.adapter.config.targeted([row.module]):
                rank = case.adapter.config.rank_of(row.module)
                refusals += _mismatch(row, {"a": (rank, wide), "b": (tall, rank)})
        elif not (case.serving.lora_target_modules and not _passes(place, case.serving.lora_target_modules)):
            refusals += _vllm_slot(case, row, place, wide, tall)
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


def _vllm_slot(case: Case, row: Expected, place: Place, wide: int, tall: int) -> list[tuple[str, str]]:
    """Why vLLM dies while it fills the slot (`set_lora`, `optimize`), if it does."""
    pair = row.entry
    assert pair is not None
    assert place.module is not None
    limit = case.serving.max_lora_rank or MAX_RANKS[-1]
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
