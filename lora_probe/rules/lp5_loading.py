"""LP5xx: what an engine did with the pair when it loaded the adapter. Out: `read` and `placed`."""

from __future__ import annotations

from lora_probe.rules.paths import difference
from lora_probe.rules.registry import Family, rule

FAMILY = Family("LP5", "loading, in a running engine", commands="trace, compare", in_check=False)


@rule(
    "LP500",
    "not-measured",
    "load",
    "unknown",
    severity="warning",
    hint="see the reason in the message; if the recording ended early or --keep was too low, trace again",
)
def not_measured(why: str) -> str:
    """A station was not measured, so the fate of the module is unknown.

    Why it matters: unknown is neither good nor bad. The recording ended early, the level of detail was too low, or the
    engine runs the layer in a way that lora-probe cannot check yet.
    """
    return why


@rule(
    "LP501",
    "name-without-home",
    "read",
    "absent",
    hint="rename the tensors so that they match modules of the base model; the usual cause is a wrong prefix",
)
def name_without_home(stored_as: str, meant: str | None, engine: str, source: str = "the file") -> str:
    """The pair's name does not match any module of the model that the engine runs.

    Why it matters: this is the most common way for an adapter to have silently no effect. vLLM ({vllm}) checks only
    the last part of a name (`q_proj`), so it accepts the pair, never uses it, answers 200 and serves the base model;
    it logs this only at DEBUG. PEFT 0.21 silently drops the pair, and warns that its own keys are missing.

    Example: a text adapter (`model.layers.0...`) on a multimodal wrapper (`model.language_model.layers.0...`), or the
    reverse.

    Fix: rename the keys so that the part after `base_model.model.` is a path in the base model.

    References: vllm-project/vllm#34186, vllm-project/vllm#41754.
    """
    if meant is None:
        return f"{engine} has no module with that name"
    return difference(stored_as, meant, source)


@rule(
    "LP502",
    "no-lora-layer",
    "placed",
    "absent",
    hint="let the engine adapt this module: check --lora-target-modules, or target_modules in the config",
)
def no_lora_layer(engine: str, why: str) -> str:
    """The module exists, but the engine did not create a LoRA layer for it.

    Why it matters: the pair was read and then not used. vLLM ({vllm}) silently drops it if `--lora-target-modules`
    excludes its module; PEFT 0.21 creates layers only for target_modules.

    Fix: add the module to the option, or correct target_modules.
    """
    return f"{engine} did not create a LoRA layer for it: {why}"


@rule(
    "LP503",
    "not-taken",
    "read",
    "absent",
    hint="compare the tensor's name with those that PEFT's save_pretrained writes: the loader skipped it",
)
def not_taken(engine: str, why: str) -> str:
    """The module exists, but the engine's loader skipped the pair.

    Why it matters: model classes may skip names (`lora_skip_prefixes` in vLLM), PEFT 0.21 drops names that do not
    begin with `base_model.model.` (vLLM accepts them), and neither logs anything.

    Fix: save the adapter with PEFT's `save_pretrained`, or rename its keys.
    """
    return f"{engine}'s loader skipped it: {why}"


@rule(
    "LP504",
    "placed-differs",
    "placed",
    "wrong",
    hint="check whether the adapter changed or something overwrote the weights: the engine's values differ from it",
)
def placed_differs(what: str, error: float, moment: str, source: str = "the file") -> str:
    """The weights that the engine multiplies with are not A and s·B of the file, or of the pushed tensors.

    Why it matters: the request is answered by a different adapter than the one in the file: an outdated slot after a
    failed activation, an adapter id used twice, a file that changed after it was read, a scaling that was lost or
    doubled, or weights that were overwritten later (the message states when it was seen).

    How it is seen: the cast and the scaling are repeated and compared bit for bit.

    Example: a framework that adds new weights to vLLM's LoRA manager under an id that is active. vLLM ({vllm}) does not
    fill the slot again, and the old weights answer.

    Fix: in that case, remove the adapter (`remove_adapter`) before you add the new weights.
    """
    return f"{what} differs from {source} by {error:.2g} relative, seen {moment}"


@rule(
    "LP505",
    "placed-empty",
    "placed",
    "absent",
    hint="trace again and report it with the trace: the engine reset the module's slot instead of filling it",
)
def placed_empty(moment: str) -> str:
    """The pair was read and the module has a slot, but the slot is empty.

    Why it matters: the layer multiplies with zeros, and the module behaves as in the base model. Seen if one module is
    reachable under two names and the second resets the slot that the first filled.

    References: vllm-project/vllm#42757.
    """
    return f"its slot contains only zeros {moment}"


FEW_RELOADS = 1
"""A client may well load an unchanged adapter in place once more by hand."""


@rule(
    "LP506",
    "reloaded-unchanged",
    "load",
    "wrong",
    severity="warning",
    hint="set load_inplace only on the request that loads new weights, not on later ones; on a server, unload the "
    "adapter and load it again without load_inplace",
)
def reloaded(reloads: int) -> str | None:
    """The engine read the same adapter again and again, because its requests have `load_inplace`.

    Why it matters: vLLM ({vllm}) reloads an adapter whose request has `load_inplace` on every step, not once. Each
    generated token then costs a read of the whole adapter (from disk, or from the pushed tensors), its packing, and a
    refill of the slot on every worker, while all other requests of the batch wait. The answers are right.

    What it does: a load whose content is unchanged stays one load with one ledger, and its repetitions are counted. New
    content under the same id is a new load with the next generation. The count is written when it doubles, and when the
    load ends, so that of a server that was killed may be too low.

    Example: one request for 14 tokens read the adapter 15 times. A server keeps `load_inplace: true` of
    `/v1/load_lora_adapter`, and sends it with every request for that adapter.

    Fix: in a script, send `load_inplace=True` once, then requests without it. On a server, call
    `/v1/unload_lora_adapter`, then `/v1/load_lora_adapter` without `load_inplace`. Its new id also keeps the prefix
    cache from mixing old and new weights.
    """
    if reloads <= FEW_RELOADS:
        return None
    return f"the unchanged adapter was read at least {reloads} more times, because its requests have load_inplace"
