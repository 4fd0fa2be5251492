"""LP3xx: the pair against the base model. In: the pair, the base's shape (`transposed` for Conv1D). Out: `stored`."""

from __future__ import annotations

from lora_probe.adapter import AdapterModule
from lora_probe.rules.registry import rule


@rule(
    "LP301",
    "shape-differs-from-base",
    "stored",
    "wrong",
    hint="this adapter was trained on another base: give the right one with --model",
)
def shape_differs(pair: AdapterModule, shape: tuple[int, int], transposed: bool) -> str | None:
    """A or B does not fit the weight that it adapts.

    Why it matters: vLLM ({vllm}) pads a pair that is too small with zeros and serves it without a word; a
    pair that is too large dies with a broadcasting error that names no module. PEFT 0.21 says size mismatch.

    Example: an adapter of the 0.5B model served on the 7B model.

    Mend: serve it on the base it was trained on.
    """
    given = (pair.b.shape[0] if pair.b else shape[0], pair.a.shape[-1] if pair.a else shape[1])
    out_features, in_features = shape[::-1] if pair.embedding else shape
    if transposed and given == (in_features, out_features):
        # A Conv1D keeps its weight the other way round, and a checkpoint does not say which of its weights are such.
        return None
    if pair.a is not None and pair.a.shape[-1] != in_features:
        return f"lora_A takes {pair.a.shape[-1]} inputs, the base's weight has {in_features}"
    if pair.b is not None and pair.b.shape[0] != out_features:
        return f"lora_B gives {pair.b.shape[0]} outputs, the base's weight has {out_features}"
    return None
