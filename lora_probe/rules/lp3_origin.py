"""LP3xx: what the adapter was trained on, compared with the base model. In: a `Subject`. Out: `AdapterFinding`s."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.adapter.variants import initialisation
from lora_probe.base import Base
from lora_probe.errors import ProbeError
from lora_probe.files import brief, shown
from lora_probe.files.json_object import read_json
from lora_probe.names import name_modules
from lora_probe.rules.containment import contained, shares
from lora_probe.rules.initialisation import alignments
from lora_probe.rules.registry import AdapterFinding, survey
from lora_probe.rules.sizes import differing

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

QUANTISED = ("bnb-4bit", "bnb-8bit", "-4bit", "-8bit", "awq", "gptq", "fp8", "int4", "int8", "nf4", "w4a16", "mxfp4")
"""What the names of quantised models contain."""


@survey(
    "LP312",
    "another-base",
    severity="warning",
    needs="base",
    hint="serve it on the base model that it was trained on; names and shapes alone cannot tell similar models apart",
    field="base_model_name_or_path",
    follows=("LP301",),
)
def another_base(subject: Subject) -> Iterator[AdapterFinding]:
    """The base model is not the one that the adapter's config sets, although every pair fits.

    What it does: compares the sizes in the configs of both models, if the one that adapter_config.json sets is on this
    machine. Otherwise compares the last part of `base_model_name_or_path` with the name in the base model's own config
    (`_name_or_path`), if both are set. Folder names prove nothing; LP318 reports them.

    Why it matters: an adapter of the instruct model loads silently on the plain base model, or on another fine-tune,
    in both engines; the answers are poor.

    References: predibase/lorax#58, predibase/lorax#311.
    """
    assert subject.base is not None
    wanted, own = subject.adapter.config.base_model, subject.base.config.get("_name_or_path")
    named, passed = subject.origin.named, subject.origin.passed
    if named is not None and (sizes := differing(named, subject.base)) is not None:
        words, theirs, ours = sizes
        yield AdapterFinding(
            f"the adapter's base model is `{shown(wanted or '')}` ({words} {theirs}), "
            f"but `{shown(passed or '')}` has {words} {ours}"
        )
    elif _has_other_name(subject):
        yield AdapterFinding(
            f"the adapter's base model is `{shown(wanted or '')}`, "
            f"but this base model's config states `{shown(str(own))}`"
        )


def _has_other_name(subject: Subject) -> bool:
    """Whether the base model's own config names another model than the adapter's config does."""
    assert subject.base is not None
    wanted, own = subject.adapter.config.base_model, subject.base.config.get("_name_or_path")
    if not wanted or not isinstance(own, str) or not own or Path(own).is_absolute() or Path(wanted).is_absolute():
        return False
    return not _same_name(wanted, own)


def _same_name(first: str, second: str) -> bool:
    """Whether two ids or paths end alike, quantisation aside; also if nothing is left of one of them."""
    words = [_without_quantisation(name.rstrip("/").split("/")[-1].lower()) for name in (first, second)]
    return not all(words) or words[0] == words[1]


@survey(
    "LP318",
    "base-of-another-name",
    severity="info",
    needs="base",
    hint="ignore this if both names mean the same model",
    field="base_model_name_or_path",
    follows=("LP301", "LP312"),
)
def base_of_another_name(subject: Subject) -> Iterator[AdapterFinding]:
    """--model has another name than the base model in adapter_config.json, and the files do not show a difference.

    What it does: compares the last parts of both names, and the place of the model in the Hugging Face cache. Reports
    nothing for the same folder, for a snapshot of the named model, and for a quantised copy of it (LP313).

    Why it matters: a folder may have any name, so this is often the same model. If it is another fine-tune of it,
    every pair fits, and the answers are poor in every engine.

    Example: the config names `Qwen/Qwen2.5-0.5B-Instruct`, and `--model /models/qwen` is passed.
    """
    assert subject.base is not None
    wanted, passed = subject.adapter.config.base_model, subject.origin.passed
    if not wanted or passed is None or _is_same_model(wanted, passed, subject.base):
        return
    yield AdapterFinding(f"adapter_config.json names the base model `{shown(wanted)}`, --model is `{shown(passed)}`")


def _is_same_model(wanted: str, passed: str, base: Base) -> bool:
    try:
        same_folder = Path(wanted).resolve() == base.path.resolve()
    except (OSError, ValueError):
        same_folder = False
    own = base.config.get("_name_or_path")
    names = [_id(passed), _id(str(base.path)), *([own] if isinstance(own, str) and own else [])]
    return same_folder or any(_same_name(_id(wanted), name) for name in names)


def _id(name: str) -> str:
    """The id of a model for a folder in the Hugging Face cache, which is named `models--org--name`; else the name."""
    folder = next((part for part in name.split("/") if part.startswith("models--")), None)
    return name if folder is None else folder.removeprefix("models--").replace("--", "/")


@survey(
    "LP313",
    "trained-on-quantised-base",
    severity="warning",
    hint="serve the same quantised base model, or compare the answers with PEFT on it: `lora-probe compare`",
    field="base_model_name_or_path",
)
def trained_on_quantised(subject: Subject) -> Iterator[AdapterFinding]:
    """The config sets a quantised base model, but the one that is served is not quantised.

    What it does: takes the quantisation from the base model's name in the adapter's config, and compares it with
    `quantization_config` in the base model's own config. Without a base model, LP314 reports what to look at.

    Why it matters: the adapter learned to compensate for the rounding of the quantised weights. On 16-bit weights, or
    with another quantisation, it runs silently in both engines, weaker or worse than in training.

    Example: `unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit`.

    References: unslothai/unsloth-zoo#810, vllm-project/vllm#42488.
    """
    named = subject.adapter.config.base_model or ""
    mark = _quantisation(named)
    if mark is None:
        return
    if subject.base is None:
        return
    own = subject.base.text.get("quantization_config") or subject.base.config.get("quantization_config")
    if not own:
        yield AdapterFinding(
            f"the adapter was trained on `{shown(named)}` ({mark}), but this base model is not quantised",
        )


@survey(
    "LP314",
    "trained-on-quantised-note",
    severity="info",
    hint="pass the base model that you will serve with --model to compare it",
    field="base_model_name_or_path",
)
def quantised_note(subject: Subject) -> Iterator[AdapterFinding]:
    """The config sets a quantised base model, and there is no base model to compare it with.

    Why it matters: as LP313: on weights in another precision, the adapter behaves differently.
    """
    named = subject.adapter.config.base_model or ""
    mark = _quantisation(named)
    if subject.base is None and mark is not None:
        trained = f"the adapter was trained on `{shown(named)}` ({mark})"
        yield AdapterFinding(f"{trained}: on a base model in another precision it behaves differently")


def _quantisation(name: str) -> str | None:
    text = name.lower()
    mark = next((mark for mark in QUANTISED if mark in text), None)
    return mark.strip("-") if mark else None


def _without_quantisation(word: str) -> str:
    for mark in (*QUANTISED, "unsloth", "hf"):
        word = word.replace(mark, "")
    return word.strip("-_.")


@survey(
    "LP315",
    "tokenizer-differs",
    severity="warning",
    needs="base",
    hint="serve with the adapter's template: `vllm serve --chat-template CKPT/chat_template.jinja`",
    follows=("LP301",),
)
def tokenizer_differs(subject: Subject) -> Iterator[AdapterFinding]:
    """The chat template in the adapter's folder differs from that of the base model.

    What it does: compares the templates (chat_template.jinja, or the one in tokenizer_config.json) if both have one.

    Why it matters: vLLM uses the tokenizer and template of the base model and ignores the adapter's (it warns once,
    for every adapter): the adapter receives prompts in a format that it was not trained on.

    References: hiyouga/LlamaFactory#10596, unslothai/unsloth#1519.
    """
    assert subject.base is not None
    own, base = _template(subject.adapter.path), _template(subject.base.path)
    if own is not None and base is not None and own[0].strip() != base[0].strip():
        yield AdapterFinding(f"`{own[1].name}` of the adapter differs from the base model's chat template", path=own[1])


MAX_TEMPLATE = 1_000_000


def _template(folder: Path) -> tuple[str, Path] | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file() and path.stat().st_size < MAX_TEMPLATE:
            return path.read_text(encoding="utf-8"), path
    except (OSError, UnicodeDecodeError):
        return None
    path = folder / "tokenizer_config.json"
    try:
        template = read_json(path).get("chat_template") if path.is_file() else None
    except ProbeError:
        return None
    if isinstance(template, str):
        return template, path
    return (json.dumps(template), path) if template else None


@survey(
    "LP317",
    "part-of-the-base",
    needs="weights of the base",
    hint="restore `pissa` or `olora` in init_lora_weights for PEFT, or convert the adapter",
    field="init_lora_weights",
    follows=("LP320",),
)
def part_of_the_base(subject: Subject) -> Iterator[AdapterFinding]:
    """A and B are a part of this base model's own weights, but the config does not state it.

    What it does: reads the weights of up to three modules and checks whether A follows from B and the weight, as after
    PiSSA or OLoRA initialisation. The cosine is near 1 for such pairs, and near 0 for pairs that started at zero.

    Why it matters: someone set init_lora_weights to true, as vLLM's refusal suggests. In training the part was
    subtracted from the base model; now it is not subtracted any more and counts twice, silently, in both engines.
    Measured: PiSSA 0.05 and OLoRA 0.09 away from the trained model, whose whole training signal was 0.02.

    References: huggingface/transformers#34468.
    """
    init = subject.adapter.config.raw.get("init_lora_weights")
    row = initialisation(init)
    if row is not None and row.changes_base:
        return
    assert subject.base is not None
    aligned = list(alignments(subject.adapter, subject.base))
    if aligned and min(cosine for _, cosine in aligned) > ALIGNED:
        pair, cosine = max(aligned, key=lambda item: item[1])
        part = f"the pair is a part of the base model's own weight (cosine {cosine:.2f}), as with PiSSA and OLoRA"
        yield AdapterFinding(f"`{shown(pair.module)}`: {part}, but init_lora_weights is {brief(init)}")


ALIGNED = 0.5
"""Measured: PiSSA 0.97 and OLoRA 0.99 after some training, 0.82 and 0.93 after B had moved by its own size; pairs that
started at zero 0.08 or less, those of the demo 0.03."""


@survey(
    "LP320",
    "merged-already",
    needs="weights of the base",
    hint="pass the base model that the adapter was trained on with --model, or serve this one without the adapter",
)
def merged_already(subject: Subject) -> Iterator[AdapterFinding]:
    """The base model's weights already contain this adapter.

    What it does: reads the weights W of up to four modules and computes ⟨W, ΔW⟩ / |ΔW|², the share of ΔW = s·B·A that W
    contains: 1 if the adapter was merged into W, 0 if W is unrelated. The weight itself moves the share by chance; how
    far is estimated from W in the directions of ΔW. Reports nothing unless that noise is small in each module that
    counts, and the share is near 1 in all of them. An initialisation that takes a part out of the base (PiSSA, OLoRA)
    is left to LP317.

    Why it matters: the adapter is added a second time, silently, in both engines: the training counts twice.

    Example: `--model` is the output of `merge_and_unload`.

    Fix: serve the base model that the adapter was trained on, or the merged one without the adapter.
    """
    assert subject.base is not None
    row = initialisation(subject.adapter.config.raw.get("init_lora_weights"))
    if row is not None and row.changes_base:
        return
    result = contained(list(shares(subject.adapter, subject.base)))
    if result is not None:
        mean, clear = result
        named, passed = subject.adapter.config.base_model, subject.origin.passed
        other = bool(named) and passed not in (None, named)
        own = f"--model {shown(named or '')}, which adapter_config.json names" if other else ""
        count = f"each of {len(clear)} weights that were compared" if len(clear) > 1 else "the weight that was compared"
        yield AdapterFinding(
            f"this base model already contains the adapter: {count} holds {mean:.2f} times s·B·A "
            f"({name_modules([share.pair.module for share in clear])})",
            path=subject.adapter.weights.path,
            hint=f"pass {own}, or serve this model without the adapter" if own else "",
        )
