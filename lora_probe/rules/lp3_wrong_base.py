"""LP3xx: an adapter on a base of another size or class. In: a `Subject`. Out: `AdapterFinding`s, one for all pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_probe.base import Shapes
from lora_probe.base.engine_view import CLASSIFIER_HEADS
from lora_probe.files import brief, shown
from lora_probe.ledger import Finding
from lora_probe.names import LAYER, in_words, layer_of, name_modules, projection_of
from lora_probe.rules.lp2_files import EMBEDDINGS
from lora_probe.rules.lp3_shapes import shape_differs
from lora_probe.rules.paths import listed
from lora_probe.rules.registry import AdapterFinding, whole
from lora_probe.rules.sizes import Sizes, sizes_of
from lora_probe.rules.stored import Expected, expect

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject


@whole("LP301")
def wrong_base(subject: Subject) -> Iterator[AdapterFinding]:
    """One finding with both bases, if every pair of some projection does not fit, or if no name fits."""
    if subject.base is None or not subject.shapes or not subject.adapter.modules:
        return
    rows = expect(subject.adapter, subject.shapes, spectra={pair.key: None for pair in subject.adapter.modules})
    held = [row for row in rows if row.entry is not None]
    misfits = _misfits(subject, held)
    if misfits:
        facts = _facts(subject, held, [row for row, _ in misfits])
        row, finding = misfits[0]
        has = f"{name_modules([row.module])}: {finding.message}"
        keys = tuple(row.entry.key for row, _ in misfits if row.entry is not None)
        yield _found(subject, facts, has, keys)
    elif _more_or_fewer_layers(subject, rows):
        yield _found(subject, _facts(subject, held, ()), "")
    elif _no_name_fits(subject, held):
        names = listed(sorted({projection_of(row.module) for row in held}), 3)
        yield _found(subject, [], f"its modules ({names}) are not in `{_served(subject)}`")


def _misfits(subject: Subject, held: Sequence[Expected]) -> list[tuple[Expected, Finding]]:
    """The pairs of those projections that do not fit in any layer. If only some layers do not fit, they are damaged."""
    transposed = bool(subject.adapter.config.raw.get("fan_in_fan_out"))
    kinds: dict[str, list[tuple[Expected, Finding | None]]] = {}
    for row in held:
        assert row.entry is not None
        shape = (subject.shapes or {}).get(row.module)
        # The rows of these depend on the tokens and the labels, not on the base alone.
        words = {projection_of(row.module), row.module.partition(".")[0]}
        if shape is None or not row.entry.matrices or row.entry.parameter != "weight":
            continue
        if words.isdisjoint((*EMBEDDINGS, *CLASSIFIER_HEADS)):
            judged = shape_differs(row.entry, shape, transposed)
            kinds.setdefault(LAYER.sub(".*.", row.module), []).append((row, judged))
    return [
        (row, finding)
        for members in kinds.values()
        if all(finding is not None for _, finding in members)
        for row, finding in members
        if finding is not None
    ]


def _more_or_fewer_layers(subject: Subject, rows: Sequence[Expected]) -> bool:
    """Whether the file's layers are exactly those of the base that the config names, and not those of this base."""
    assert subject.base is not None
    named = subject.origin.named
    if named is None or not any(row.entry is None or row.homeless for row in rows):
        return False
    layers, wanted = sizes_of(subject.base).layers, sizes_of(named).layers
    return None not in (layers, wanted) and layers != wanted == _layers(subject, [r for r in rows if r.entry])


def _no_name_fits(subject: Subject, held: Sequence[Expected]) -> bool:
    """Whether neither a pair nor a target is in the base, although the config targets the pairs."""
    config, shapes = subject.adapter.config, subject.shapes or {}
    if subject.targeted or config.raw.get("target_parameters") or config.raw.get("layer_replication"):
        return False
    if any(place.module is not None for places in subject.places.values() for place in places.values()):
        return False
    return all(row.module not in shapes and config.targets.module(row.module) for row in held)


def _found(
    subject: Subject,
    facts: Sequence[tuple[str, str]],
    otherwise: str,
    keys: tuple[tuple[str, str, int | None], ...] = (),
) -> AdapterFinding:
    """`facts` are pairs of phrases about the adapter's base and this one; without any, `otherwise` is the reason."""
    named, served = shown(subject.adapter.config.base_model or ""), _served(subject)
    another = named if subject.origin.passed is not None and named != served else ""
    trained = f"trained on `{another}`" if another else "trained on another base model"
    if facts:
        theirs, ours = ", ".join(theirs for theirs, _ in facts), in_words([ours for _, ours in facts])
        message = f"{trained} ({theirs}), but `{served}` has {ours}"
    else:
        message = f"{trained}, not on `{served}`: {otherwise}"
    if another:
        hint = f"pass the base model that adapter_config.json names: --model {another}"
    elif named:
        hint = "pass the base model that it was trained on with --model: adapter_config.json names another one"
    else:
        hint = ""
    path = subject.adapter.weights.path
    return AdapterFinding(message, keys, "stored", "wrong" if keys else "ok", path=path, hint=hint)


def _served(subject: Subject) -> str:
    assert subject.base is not None
    return shown(subject.origin.passed or subject.adapter.config.base_model or subject.base.path.name)


def _facts(subject: Subject, held: Sequence[Expected], misfits: Sequence[Expected]) -> list[tuple[str, str]]:
    """What differs between the two bases as a whole: `hidden size 896` and `hidden size 576`, then the layers."""
    assert subject.base is not None
    this, named = sizes_of(subject.base), subject.origin.named
    other = sizes_of(named) if named is not None else Sizes(None, None)
    hidden = other.hidden or _hidden(misfits, subject.shapes or {}, this.hidden)
    layers = other.layers or _layers(subject, held)
    facts = []
    if None not in (hidden, this.hidden) and hidden != this.hidden:
        facts.append((f"hidden size {brief(hidden)}", f"hidden size {brief(this.hidden)}"))
    if (facts or named is not None) and None not in (layers, this.layers) and layers != this.layers:
        facts.append((f"{brief(layers)} layers", f"{brief(this.layers)} layers"))
    return facts


def _hidden(misfits: Sequence[Expected], shapes: Shapes | Mapping[str, None], hidden: int | None) -> int | None:
    """The inputs of the pairs whose modules read the hidden states of this base."""
    inputs: Counter[int] = Counter()
    for row in misfits:
        shape = shapes.get(row.module)
        if row.entry is not None and row.entry.inputs is not None and shape is not None and shape[1] == hidden:
            inputs[row.entry.inputs] += 1
    return inputs.most_common(1)[0][0] if inputs else None


def _layers(subject: Subject, held: Sequence[Expected]) -> int | None:
    """The layers of the adapter's base, if its config adapts all of them."""
    config = subject.adapter.config
    if config.raw.get("layers_to_transform") is not None or not isinstance(config.target_modules, tuple):
        return None
    if any("." in name for name in config.target_modules):
        return None
    numbers = [layer for row in held if row.entry is not None and (layer := layer_of(row.entry.module)) is not None]
    return max(numbers) + 1 if numbers else None
