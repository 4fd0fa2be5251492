"""LP3xx: what the adapter was trained on, against the base that is given. In: a `Subject`. Out: `AdapterFinding`s."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.adapter.variants import initialisation
from lora_probe.errors import ProbeError
from lora_probe.files import brief, shown
from lora_probe.files.json_object import read_json
from lora_probe.rules.initialisation import alignments
from lora_probe.rules.registry import AdapterFinding, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

QUANTISED = ("bnb-4bit", "bnb-8bit", "-4bit", "-8bit", "awq", "gptq", "fp8", "int4", "int8", "nf4", "w4a16", "mxfp4")
"""What the names of quantised models end in, or hold."""


@survey(
    "LP312",
    "another-base",
    severity="warning",
    needs="base",
    hint="serve it on the base that it was trained on; names and shapes cannot tell two models of one kind apart",
    field="base_model_name_or_path",
)
def another_base(subject: Subject) -> Iterator[AdapterFinding]:
    """The base that is given calls itself otherwise than the base that the config names.

    What it does: compares the last word of `base_model_name_or_path` with what the base's own config says that it is
    (`_name_or_path`), where both say something. A folder's name proves nothing and is not compared.

    Why it matters: an adapter of the instruct model loads on the base model, or on another fine-tune, without a word in
    either engine; answers are poor.

    References: predibase/lorax#58, predibase/lorax#311.
    """
    assert subject.base is not None
    named, own = subject.adapter.config.base_model, subject.base.config.get("_name_or_path")
    if not named or not isinstance(own, str) or not own or Path(own).is_absolute() or Path(named).is_absolute():
        return
    words = [word.rstrip("/").split("/")[-1].lower() for word in (named, own)]
    plain = [_without_quantisation(word) for word in words]
    if plain[0] and plain[1] and plain[0] != plain[1]:
        said = f"the adapter names `{shown(named)}`, the base calls itself `{shown(own)}`"
        yield AdapterFinding(said)


@survey(
    "LP313",
    "trained-on-quantised-base",
    severity="warning",
    hint="serve the same quantised base, or check the answers against PEFT on it: `lora-probe compare`",
    field="base_model_name_or_path",
)
def trained_on_quantised(subject: Subject) -> Iterator[AdapterFinding]:
    """The config names a quantised base, and the base that is given is not quantised that way.

    What it does: reads the quantisation out of the name of the base in the adapter's config, and holds it against
    `quantization_config` in the base's own. Without a base it says what to look at, as a note.

    Why it matters: the adapter learned to make up for the rounding of the quantised weights. On 16-bit weights, or on
    another quantisation, it runs in both engines without a word, weaker or worse than in training.

    Example: `unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit`. References: unslothai/unsloth-zoo#810, vllm-project/vllm#42488.
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
            f"the adapter was trained on `{shown(named)}` ({mark}), and this base is not quantised",
        )


@survey(
    "LP314",
    "trained-on-quantised-note",
    severity="info",
    hint="give the base that will be served with --model, to have it compared",
    field="base_model_name_or_path",
)
def quantised_note(subject: Subject) -> Iterator[AdapterFinding]:
    """The config names a quantised base, and no base was given to compare it with.

    Why it matters: as LP313: served on weights in another precision, the adapter is another function.
    """
    named = subject.adapter.config.base_model or ""
    mark = _quantisation(named)
    if subject.base is None and mark is not None:
        said = f"the adapter was trained on `{shown(named)}` ({mark})"
        yield AdapterFinding(f"{said}: on a base in another precision it is another function")


def _quantisation(name: str) -> str | None:
    text = name.lower()
    found = next((mark for mark in QUANTISED if mark in text), None)
    return found.strip("-") if found else None


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
)
def tokenizer_differs(subject: Subject) -> Iterator[AdapterFinding]:
    """The adapter's folder holds another chat template than the base's.

    What it does: compares the templates (chat_template.jinja, or the one in tokenizer_config.json) where both have one.

    Why it matters: vLLM takes tokenizer and template from the base alone and ignores the adapter's (it warns once, for
    every adapter): the adapter answers prompts of a form that it was not trained on.

    References: hiyouga/LlamaFactory#10596, unslothai/unsloth#1519.
    """
    assert subject.base is not None
    mine, theirs = _template(subject.adapter.path), _template(subject.base.path)
    if mine is not None and theirs is not None and mine[0].strip() != theirs[0].strip():
        yield AdapterFinding(f"`{mine[1].name}` beside the adapter is not the base's template", path=mine[1])


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
        found = read_json(path).get("chat_template") if path.is_file() else None
    except ProbeError:
        return None
    if isinstance(found, str):
        return found, path
    return (json.dumps(found), path) if found else None


@survey(
    "LP317",
    "part-of-the-base",
    needs="weights of the base",
    hint="write `pissa` or `olora` back into init_lora_weights for PEFT, or convert the adapter",
    field="init_lora_weights",
)
def part_of_the_base(subject: Subject) -> Iterator[AdapterFinding]:
    """A and B are a part of this very base's weights, and the config does not say so.

    What it does: reads the weights of up to three modules and looks whether A is what B says of the weight, as PiSSA
    and OLoRA begin. Pairs that began at zero have a cosine near 0, such pairs one near 1.

    Why it matters: someone set init_lora_weights to true to get past vLLM's refusal, which offers just that. The part
    was taken out of the base in training and is not taken out any more: it counts twice, in both engines, without a
    word. Measured: PiSSA 0.05 and OLoRA 0.09 away from the trained model, whose whole training signal was 0.02.

    References: huggingface/transformers#34468.
    """
    init = subject.adapter.config.raw.get("init_lora_weights")
    row = initialisation(init)
    if row is not None and row.changes_base:
        return
    assert subject.base is not None
    found = list(alignments(subject.adapter, subject.base))
    if found and min(cosine for _, cosine in found) > ALIGNED:
        pair, cosine = max(found, key=lambda item: item[1])
        said = (
            f"`{shown(pair.module)}` is a part of the base's own weight (cosine {cosine:.2f}), as PiSSA and OLoRA begin"
        )
        yield AdapterFinding(f"{said}, and init_lora_weights is {brief(init)}")


ALIGNED = 0.5
"""PiSSA and OLoRA were at 0.97 and 0.99 after some training, at 0.82 and 0.93 where B had moved by its own size; pairs
that began at zero at 0.08 or less, those of the demo at 0.03."""
