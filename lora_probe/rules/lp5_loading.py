"""LP5xx: what an engine did with the pair when it loaded the adapter. Out: `read` and `placed`."""

from __future__ import annotations

from lora_probe.files import shown
from lora_probe.rules.paths import starts
from lora_probe.rules.registry import Family, rule

FAMILY = Family("LP5", "loading, in a running engine", commands="trace", in_check=False)


@rule(
    "LP500",
    "not-measured",
    "load",
    "unknown",
    severity="warning",
    hint="the sentence says why; trace again, with a higher level of detail if it was switched off",
)
def not_measured(why: str) -> str:
    """A station was not measured, so the fate of the module is unknown.

    Why it matters: unknown is neither good nor bad. The recording ended early, a level of detail was switched off,
    or the engine runs the layer in a way that nobody has verified yet.
    """
    return why


@rule(
    "LP501",
    "name-without-home",
    "read",
    "absent",
    hint="rename the keys in the file so that they name modules of the base; a dead prefix is the usual cause",
)
def name_without_home(stored_as: str, meant: str | None, engine: str) -> str:
    """The pair's name is no module of the model that the engine runs.

    Why it matters: vLLM ({vllm}) looks only at the last word of a name (`q_proj`), so it takes the pair,
    never asks for it, answers 200 and serves the base; its only line is at DEBUG. PEFT 0.21 drops the pair
    without a word and warns that its own keys are missing.

    Example: a text adapter (`model.layers.0...`) on a multimodal wrapper (`model.language_model.layers.0...`),
    or the reverse. References: vllm-project/vllm#34186, vllm-project/vllm#41754.

    Mend: rename the keys, so that what stands after `base_model.model.` is a path of the base.
    """
    if meant is None:
        return f"{engine} has no module of that name"
    file_start, base_start = starts(stored_as, meant)
    return f"the names in the file begin with `{shown(file_start)}`, the model's with `{shown(base_start)}`"


@rule(
    "LP502",
    "no-lora-layer",
    "placed",
    "absent",
    hint="let the engine adapt this module: look at --lora-target-modules, or at target_modules in the config",
)
def no_lora_layer(engine: str, why: str) -> str:
    """The module exists, but the engine made no LoRA layer of it.

    Why it matters: the pair was read and has nowhere to go. vLLM ({vllm}) drops it in silence when
    `--lora-target-modules` leaves its module out; PEFT 0.21 makes layers for target_modules only.

    Mend: widen the option, or correct target_modules.
    """
    return f"{engine} made no LoRA layer of it: {why}"


@rule(
    "LP503",
    "not-taken",
    "read",
    "absent",
    hint="the loader skipped the tensor: compare its name with those that PEFT's save_pretrained writes",
)
def not_taken(engine: str, why: str) -> str:
    """The module exists, and still the engine's loader did not take the pair.

    Why it matters: model classes may skip names (`lora_skip_prefixes` in vLLM), PEFT 0.21 drops names that do not
    begin with `base_model.model.` (vLLM takes them), and neither logs anything.

    Mend: save the adapter with PEFT's `save_pretrained`, or rename its keys.
    """
    return f"{engine}'s loader did not take it: {why}"


@rule(
    "LP504",
    "placed-differs",
    "placed",
    "wrong",
    hint="the engine holds other numbers than the file: the file changed, or something wrote over them",
)
def placed_differs(what: str, error: float, moment: str) -> str:
    """What the engine multiplies with is not A and s·B of the file.

    Why it matters: the request is answered by another adapter than the one in the file: a stale slot after a failed
    activation, an adapter id used twice, a file that changed after it was read, a scaling lost or doubled, or
    something that overwrote the weights later (the sentence says when it was seen).

    How it is seen: the cast and the scaling are replayed and compared bit for bit.
    """
    return f"{what} differs from the file by {error:.2g} relative, seen {moment}"


@rule(
    "LP505",
    "placed-empty",
    "placed",
    "absent",
    hint="the engine reset the module's slot instead of filling it: trace again and report it with the trace",
)
def placed_empty(moment: str) -> str:
    """The pair was read, the module has a slot, and the slot is empty.

    Why it matters: the layer multiplies with zeros, and the module behaves as the base. Seen where one module is
    reachable under two names and the second resets what the first had set. References: vllm-project/vllm#42757.
    """
    return f"its slot holds nothing but zeros {moment}"
