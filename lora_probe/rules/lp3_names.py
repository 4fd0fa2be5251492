"""LP3xx: names against the modules of the base. In: a pair's name and what the engine has. Out: `read` and `placed`."""

from __future__ import annotations

from lora_probe.files import shown
from lora_probe.rules.registry import rule


@rule(
    "LP302",
    "names-of-another-class",
    "read",
    "absent",
    needs="base",
    hint="rename the keys (`lora-probe check --fix -o FIXED/`), or serve the class that it was trained on",
    fixable=True,
)
def other_class(file_start: str, base_start: str) -> str:
    """The names fit the base but for what stands before the layers: those of another class of the same model.

    What it does: where the path from the layer's number on is that of exactly one module of the base, that module was
    meant.

    Why it matters: the best known way to serve the base model: a text adapter (`model.layers.0...`) on a multimodal
    wrapper (`language_model.model.layers.0...`), or the reverse. vLLM compares the last word of a name alone, so it
    takes the adapter, answers 200, and no module asks for it (before 0.33, which tries text names on
    multimodal models). PEFT 0.21 warns of missing keys and serves the base.

    References: vllm-project/vllm#34186, #48019, #41754, huggingface/peft#2566.
    """
    return f"the names in the file begin with `{shown(file_start)}`, the model's with `{shown(base_start)}`"


@rule(
    "LP303",
    "no-such-module",
    "read",
    "absent",
    needs="base",
    hint="this adapter was trained on another model: give the right one with --model",
    consequence=True,
)
def no_such_module(model: str) -> str:
    """The pair's name is no module of the base, and no module of the base was meant by it.

    What it does: looks the name up as the engine does, after its own renaming.

    Why it matters: the pair is dropped. vLLM ({vllm}) refuses only a last word that it does not know at all;
    a layer that the base does not have, a layer that shares another's keys and values, or a word that exists
    elsewhere in the model (`fc1` of a vision tower) goes in silence. PEFT 0.21 is silent as well.

    Example: layer 30 on a base of 30 layers (0 to 29). References: vllm-project/vllm#21500, #54917.
    """
    return f"{shown(model)} has no such module"


@rule(
    "LP304",
    "no-lora-layer-there",
    "placed",
    "absent",
    needs="base",
    hint="the engine cannot adapt this module: merge the adapter, or train without the module",
)
def no_lora_layer_there(why: str) -> str:
    """The module exists, and the engine makes no LoRA layer of it.

    Why it matters: the pair is read and has nowhere to go. vLLM ({vllm}) adapts the language model of a
    multimodal one unless `--enable-tower-connector-lora` is given, and embeddings only for classes that name them.

    Example: `target_modules="all-linear"` on a vision-language model. References: vllm-project/vllm#23796, #40307.
    """
    return why


@rule(
    "LP305",
    "skipped-by-class",
    "read",
    "absent",
    needs="base",
    engines=("vllm",),
    hint="nothing to mend: the engine's class skips these modules on purpose",
)
def skipped(why: str) -> str:
    """vLLM's class of the model skips these names.

    Why it matters: the pairs are not loaded, by design and without a word (`lora_skip_prefixes`, for instance `mtp.`).
    """
    return why
