"""LP3xx: a pair compared with the base model. In: the pair, the shape (`transposed` for Conv1D). Out: `stored`."""

from __future__ import annotations

from lora_probe.adapter import AdapterModule
from lora_probe.rules.registry import rule


@rule(
    "LP301",
    "shape-differs-from-base",
    "stored",
    "wrong",
    needs="base",
    hint="pass the base model that the adapter was trained on with --model: this is another one",
    follows=("LP319",),
)
def shape_differs(pair: AdapterModule, shape: tuple[int, int], transposed: bool) -> str | None:
    """A or B does not fit the weight that it adapts.

    What it does: compares every pair with the base model's weight. If all pairs of a projection do not fit, or if the
    base model has neither the file's modules nor those that the config targets, the adapter was trained on another base
    model: then there is one finding that names both, and what follows from it is not reported (missing or unknown
    modules, targets without a module, another vocabulary).

    Why it matters: vLLM ({vllm}) pads a pair that is too small with zeros and silently serves it; a pair that is too
    large fails with a broadcasting error that does not name the module. PEFT 0.21 reports a size mismatch.

    Example: an adapter of the 0.5B model served on the 7B model.

    Fix: serve it on the base model that it was trained on; adapter_config.json usually names it.
    """
    actual = (pair.b.shape[0] if pair.b else shape[0], pair.inputs if pair.a else shape[1])
    out_features, in_features = shape[::-1] if pair.embedding else shape
    if transposed and actual == (in_features, out_features):
        # A Conv1D stores its weight transposed, and a checkpoint does not tell which weights belong to a Conv1D.
        return None
    if pair.a is not None and pair.inputs != in_features:
        return f"lora_A has {pair.inputs} inputs, the base model's weight has {in_features}"
    if pair.b is not None and pair.b.shape[0] != out_features:
        return f"lora_B has {pair.b.shape[0]} outputs, the base model's weight has {out_features}"
    return None
