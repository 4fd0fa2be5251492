"""LP2xx and LP3xx: names that lead nowhere. In: the pair's name and what the engine has. Out: `read` and `placed`."""

from __future__ import annotations

from collections.abc import Sequence

from lora_probe.files import shown
from lora_probe.rules.registry import rule


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names out of a file, in a sentence: `q_proj`, `v_proj` and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{shown(name)}`" for name in names[:most]) + more


def starts(stored_as: str, meant: str) -> tuple[str, str]:
    """What stands before the common end of two paths, and the first common word with it."""
    mine, theirs = stored_as.split("."), meant.split(".")
    common = 0
    while common < min(len(mine), len(theirs)) and mine[-1 - common] == theirs[-1 - common]:
        common += 1
    numbers = [i for i, word in enumerate(mine) if word.isdigit()]
    keep = len(mine) - numbers[0] if numbers else common
    keep = min(keep, common)
    return ".".join(mine[: len(mine) - keep]), ".".join(theirs[: len(theirs) - keep])


def wrapper_words(path: str) -> tuple[str, ...]:
    """The words of a path that are a wrapper's and no module's."""
    if not any(word in path for word in WRAPPERS):
        return ()
    return tuple(dict.fromkeys(word for word in path.split(".") if word in WRAPPERS))


def unwrapped(path: str) -> str:
    """The path without the words of wrappers."""
    return ".".join(word for word in path.split(".") if word not in WRAPPERS)


WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""What torch.compile, FSDP, activation checkpointing and DDP put into the names of a model that is not unwrapped."""


@rule(
    "LP213",
    "wrapper-in-name",
    "read",
    "absent",
    hint="take the wrapper out of the keys: `lora-probe check --fix -o FIXED/` does it",
)
def wrapper_in_name(words: tuple[str, ...]) -> str | None:
    """The keys carry the name of a wrapper: torch.compile, DDP, FSDP, activation checkpointing.

    What it does: looks for words of a path that belong to no model.

    Why it matters: the adapter was saved from the wrapped model. vLLM ({vllm}) takes the keys, finds no module
    for them and serves the base without a word; where only attention was wrapped, half the adapter works. PEFT 0.21
    warns of missing keys and serves the base.

    Example: `model.layers.0._orig_mod.self_attn.q_proj`. References: MakazhanAlpamys/Soup#335, huggingface/peft#2957.

    Mend: unwrap before saving, or rename the keys.
    """
    if not words:
        return None
    return f"the names hold `{'`, `'.join(words)}`, which is a wrapper's and no module's"


@rule(
    "LP214",
    "doubled-prefix",
    "read",
    "absent",
    engines=("peft",),
    hint="take one `base_model.model.` out of the keys: `lora-probe check --fix -o FIXED/` does it",
)
def doubled_prefix(bare: str) -> str | None:
    """The keys begin with `base_model.model.` twice: the model was wrapped with PEFT a second time.

    Why it matters: the engines disagree. vLLM ({vllm}) takes every occurrence of the prefix away and applies the
    adapter; PEFT 0.21 warns of missing keys and serves the base.

    Example: a script calls `get_peft_model`, and the trainer does it again. References: huggingface/trl#926.

    Mend: rename the keys.
    """
    return "the names begin with `base_model.model.` twice" if bare.startswith("base_model.model.") else None


@rule(
    "LP215",
    "prefix-missing",
    "read",
    "absent",
    engines=("peft",),
    hint="put `base_model.model.` before the keys: `lora-probe check --fix -o FIXED/` does it",
)
def prefix_missing(stored_as: str, prefix: str) -> str | None:
    """The keys do not begin with `base_model.model.`.

    Why it matters: the engines disagree. vLLM ({vllm}) takes them as they are and applies the adapter;
    `PeftModel.from_pretrained` (0.21) warns of missing keys and serves the base.

    Example: saved through transformers' own adapter methods.

    References: vllm-project/vllm#17196, huggingface/peft#3110.

    Mend: rename the keys.
    """
    return None if stored_as.startswith(prefix) else f"the names do not begin with `{prefix}`"


@rule(
    "LP221",
    "ending-that-peft-drops",
    "read",
    "absent",
    engines=("peft",),
    hint="save the adapter with PEFT's save_pretrained, or rename the keys",
)
def odd_ending(stored: str, embedding: bool, adapter: str | None) -> str | None:
    """The keys do not end as those of PEFT's layer of that kind do.

    What it does: asks for `lora_A.weight` and `lora_B.weight`, on embeddings for `lora_embedding_A` and
    `lora_embedding_B`.

    Why it matters: PEFT 0.21 drops a key that names none of its parameters, warns that its own are missing, and serves
    the base there. vLLM ({vllm}) refuses most such endings (LP210), and takes `lora_A.weight` on an embedding.

    Example: `...q_proj.lora_A`, as loralib saves it.
    """
    if adapter is not None:
        stored = stored.replace(f".{adapter}.weight", ".weight").removesuffix(f".{adapter}")
    wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return None if stored.endswith(wanted) else f"the names do not end in {' or '.join(f'`{end}`' for end in wanted)}"


@rule(
    "LP302",
    "names-of-another-class",
    "read",
    "absent",
    needs="base",
    hint="rename the keys (`lora-probe check --fix -o FIXED/`), or serve the class that it was trained on",
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
