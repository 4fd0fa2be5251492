"""LP3xx: names compared with the base model's modules. In: a name, the engine's modules. Out: `read` and `placed`."""

from __future__ import annotations

from lora_probe.files import shown
from lora_probe.rules.paths import RENAME, difference
from lora_probe.rules.registry import rule


@rule(
    "LP302",
    "names-of-another-class",
    "read",
    "absent",
    needs="base",
    hint="rename the keys (`lora-probe check --fix -o FIXED/`), or serve the model class that it was trained on",
    fixable=True,
)
def other_class(stored_as: str, meant: str) -> str:
    """The names match the base model except for the part before the layers: they belong to another class of the same
    model.

    What it does: compares the path from the layer number on; if it matches exactly one module of the base model, that
    module was meant.

    Why it matters: this is the most common way for an adapter to have silently no effect: a text adapter
    (`model.layers.0...`) on a multimodal wrapper (`language_model.model.layers.0...`), or the reverse. vLLM before
    0.33 compares only the last part of a name, so it accepts the adapter, answers 200, and never uses it; 0.33 tries
    text names on multimodal models. PEFT 0.21 warns of missing keys and serves the base model.

    References: vllm-project/vllm#34186, #48019, #41754, huggingface/peft#2566.
    """
    return difference(stored_as, meant)


@rule(
    "LP325",
    "renamed-part",
    "read",
    "absent",
    needs="base",
    hint=RENAME,
    fixable=True,
    explains=("LP306",),
)
def renamed_part(stored_as: str, meant: str) -> str:
    """The names in the file have a word that the base model does not have, in place of a word that it has.

    What it does: looks for a renaming of words that gives every pair without a module one of the modules that the
    config targets and that have no pair, with the right shape. It must be the only one, and the same for all pairs.

    Why it matters: vLLM ({vllm}) silently drops the pairs if the last word of their names is known to it, and refuses
    the file otherwise (LP306). PEFT 0.21 warns of missing keys and serves the base model.

    Example: a converter that writes `attention.q_proj` for `self_attn.q_proj`.
    """
    return difference(stored_as, meant)


@rule(
    "LP303",
    "no-such-module",
    "read",
    "absent",
    needs="base",
    hint="pass the model that the adapter was trained on with --model: this is another one",
    consequence=True,
    follows=("LP301",),
)
def no_such_module(model: str) -> str:
    """The pair's name does not match any module of the base model, not even one in another class of the model.

    What it does: looks the name up as the engine does, after the engine's own renaming.

    Why it matters: the pair is dropped. vLLM ({vllm}) refuses the file only if the last part of a name is unknown. It
    silently drops a layer that the base model does not have, a layer that reuses the keys and values of another, and a
    name that exists only elsewhere in the model (`fc1` of a vision tower). PEFT 0.21 drops the pair silently as well.

    Example: layer 30 on a base model of 30 layers (0 to 29).

    References: vllm-project/vllm#21500, #54917.
    """
    return f"{shown(model)} has no such module"


@rule(
    "LP304",
    "no-lora-layer-there",
    "placed",
    "absent",
    needs="base",
    hint="merge the adapter, or train without the module: the engine cannot adapt it",
)
def no_lora_layer_there(why: str) -> str:
    """The module exists, but the engine does not create a LoRA layer for it.

    Why it matters: the pair is read and then not used. vLLM ({vllm}) adapts only the language model of a multimodal
    model unless started with `--enable-tower-connector-lora`, and embeddings only if the model class lists them.

    Example: `target_modules="all-linear"` on a vision-language model.

    References: vllm-project/vllm#23796, #40307.
    """
    return why


@rule(
    "LP305",
    "skipped-by-class",
    "read",
    "absent",
    needs="base",
    engines=("vllm",),
    hint="ignore this: the engine's model class skips these modules on purpose",
)
def skipped(why: str) -> str:
    """vLLM's model class skips these names.

    Why it matters: the pairs are silently not loaded, by design (`lora_skip_prefixes`, for instance `mtp.`).
    """
    return why
