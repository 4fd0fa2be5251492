"""LP2xx: names that are wrong for any base model. In: a pair's name in the file. Out: `read`."""

from __future__ import annotations

from lora_probe.rules.paths import RENAME
from lora_probe.rules.registry import Sentence, rule


@rule(
    "LP213",
    "wrapper-in-name",
    "read",
    "absent",
    hint="remove the wrapper's name from the keys: `lora-probe check --fix -o FIXED/` does it",
    fixable=True,
)
def wrapper_in_name(words: tuple[str, ...]) -> str | None:
    """The keys contain the name of a wrapper: torch.compile, DDP, FSDP, checkpointing, or a second LoRA layer.

    What it does: looks for parts of a path that only wrappers add. PEFT adds `base_layer` to a layer that it wraps.

    Why it matters: the adapter was saved from the wrapped model. vLLM ({vllm}) accepts the keys, finds no module for
    them and silently serves the base model; if only attention was wrapped, half of the adapter works. PEFT 0.21 warns
    of missing keys and serves the base model.

    Example: `model.layers.0._orig_mod.self_attn.q_proj`.

    Fix: unwrap the model before saving, or rename the keys.

    References: MakazhanAlpamys/Soup#335, huggingface/peft#2957.
    """
    if not words:
        return None
    return f"the names contain `{'`, `'.join(words)}`, which comes from a wrapper, not from the model"


@rule(
    "LP214",
    "doubled-prefix",
    "read",
    "absent",
    engines=("peft",),
    hint="remove one `base_model.model.` from the keys: `lora-probe check --fix -o FIXED/` does it",
    fixable=True,
)
def doubled_prefix(bare: str) -> str | None:
    """The keys begin with `base_model.model.` twice: the model was wrapped with PEFT a second time.

    Why it matters: the engines disagree. vLLM ({vllm}) removes every occurrence of the prefix and applies the adapter;
    PEFT 0.21 warns of missing keys and serves the base model.

    Example: a script calls `get_peft_model`, and the trainer calls it again.

    Fix: rename the keys.

    References: huggingface/trl#926.
    """
    return "the names begin with `base_model.model.` twice" if bare.startswith("base_model.model.") else None


@rule(
    "LP215",
    "prefix-missing",
    "read",
    "absent",
    engines=("peft",),
    hint="add `base_model.model.` to the start of the keys: `lora-probe check --fix -o FIXED/` does it",
    fixable=True,
    explains=("LP210",),
)
def prefix_missing(stored_as: str, prefix: str) -> str | None:
    """The keys do not begin with `base_model.model.`.

    Why it matters: the engines disagree. vLLM ({vllm}) uses the keys as they are and applies the adapter;
    `PeftModel.from_pretrained` (0.21) warns of missing keys and serves the base model.

    Example: an adapter saved with transformers' own adapter methods.

    Fix: rename the keys.

    References: vllm-project/vllm#17196, huggingface/peft#3110.
    """
    return None if stored_as.startswith(prefix) else f"the names do not begin with `{prefix}`"


@rule(
    "LP221",
    "ending-that-peft-drops",
    "read",
    "absent",
    engines=("peft",),
    hint=RENAME,
    fixable=True,
    explains=("LP210",),
)
def odd_ending(stored: str, embedding: bool, adapter: str | None) -> Sentence | None:
    """The keys do not end as PEFT expects for this type of layer.

    What it does: expects `lora_A.weight` and `lora_B.weight`, on embeddings `lora_embedding_A` and `lora_embedding_B`.

    Why it matters: PEFT 0.21 drops a key that does not name one of its parameters, warns of missing keys, and serves
    the base model there. vLLM ({vllm}) refuses most such endings (LP210), and accepts `lora_A.weight` on an embedding.

    Example: `...q_proj.lora_A`, as loralib saves it.
    """
    if adapter is not None:
        stored = stored.replace(f".{adapter}.weight", ".weight").removesuffix(f".{adapter}")
    wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    if stored.endswith(wanted):
        return None
    ends = " or ".join(f"`{end}`" for end in wanted)
    # `--fix` does not know which modules are embeddings.
    hint = f"rename the endings of the keys to {ends}" if embedding and "lora_embedding" not in stored else ""
    return Sentence(f"the names do not end in {ends}", None, hint)
