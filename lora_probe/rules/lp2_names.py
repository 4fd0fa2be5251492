"""LP2xx: names that are wrong for any base. In: a pair's name in the file. Out: `read`."""

from __future__ import annotations

from lora_probe.rules.registry import rule


@rule(
    "LP213",
    "wrapper-in-name",
    "read",
    "absent",
    hint="take the wrapper out of the keys: `lora-probe check --fix -o FIXED/` does it",
    fixable=True,
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
    fixable=True,
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
    fixable=True,
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
