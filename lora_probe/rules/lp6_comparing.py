"""LP62x: why two runs differ, as `compare` finds it.

In: what both traces hold. Out: the sentence of each cause. A cause that one run shows by itself has its own rule (a
module without a home, a slot that differs from the file), and is reported under that.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_probe.rules.registry import rule


@rule(
    "LP620",
    "not-requested",
    "applied",
    "absent",
    hint="request the adapter by its name: `model` in an OpenAI request, `lora_request` in `LLM.generate`",
)
def not_requested(side: str, requests: int) -> str:
    """One run answered the prompts without the adapter: its requests named the base model.

    Why it matters: the adapter may be loaded and right, and no token of these answers ran through it. An OpenAI client
    selects an adapter by `model`; the name of the base model is accepted too, and so the mistake is silent.

    How it is seen: the prompts of the other run's adapter requests are all there, token for token, in requests without
    an adapter.
    """
    counted = f"{requests} prompt{'s' * (requests != 1)}"
    return f"the {side} did not request the adapter: it answered the same {counted} with the base model"


@rule(
    "LP621",
    "weights-at-another-scale",
    "placed",
    "wrong",
    hint="compare lora_alpha, r and use_rslora of both runs, and where each engine multiplies by alpha/r",
)
def weights_at_another_scale(what: str) -> str:
    """Both runs loaded the same file, and multiply with weights that differ by a factor.

    Why it matters: the effect of the adapter is multiplied by it. The message says what the factor is if that is known:
    the scaling itself (applied twice, or not at all), √r (rsLoRA on one side), or another sign.

    How it is seen: engines record a fingerprint of s·B·A of the weights that they run with, a few linear measurements.
    All of them have the same factor.
    """
    return what


@rule(
    "LP622",
    "other-weights-in-use",
    "placed",
    "wrong",
    hint="load the adapter again under a new name, and see what replaced its weights in the engine",
)
def other_weights_in_use(what: str) -> str:
    """Both runs loaded the same file, and multiply with different weights.

    Why it matters: the engine runs something that was never trained: a slot that was overwritten, half filled or filled
    from an older version, or values that were damaged on the way.

    How it is seen: the fingerprints of s·B·A differ by more than rounding, and not by a factor.
    """
    return what


@rule(
    "LP623",
    "weights-of-another-module",
    "placed",
    "wrong",
    hint="look at the order of the slices of a fused layer (q, k, v; gate, up), and at the names of the layers",
)
def weights_of_another_module(what: str) -> str:
    """A module runs with A and B of another projection or another layer.

    Why it matters: the shapes fit, so nothing fails, and the answers are noise. Fused layers whose slices are filled in
    another order, and layer numbers that are off by one, look like this.

    How it is seen: the fingerprint of its weights is that of the other module in the other run.
    """
    return what


@rule(
    "LP624",
    "weights-of-another-adapter",
    "placed",
    "wrong",
    hint="give every adapter a name and an integer id of its own, and load a new version under a new name",
)
def weights_of_another_adapter(what: str) -> str:
    """A module runs with the weights of another adapter, or of an earlier version of this one.

    Why it matters: requests are answered by the wrong adapter. Two adapters with the same id, or a version that was
    replaced on disk and is still in a slot, look like this.

    How it is seen: the fingerprint of its weights is that of another load in one of the traces.
    """
    return what


@rule(
    "LP625",
    "different-files",
    "stored",
    "wrong",
    hint="give both engines the same folder; `lora-probe inspect REFERENCE CANDIDATE` compares the two adapters",
)
def different_files(what: str, paths: Sequence[str]) -> str:
    """The two runs loaded files with different weights or scalings.

    Why it matters: then nothing is wrong with the engines. The message says how the files differ: by a factor, in some
    modules, or in all of them.

    How it is seen: the digests of the files differ, and so do the fingerprints of s·B·A, which engines take from the
    file before they round it.
    """
    one, two = paths
    return f"the runs loaded different adapters, {one} and {two}: {what}"


@rule(
    "LP626",
    "different-prompts",
    "applied",
    "wrong",
    hint="use the same tokenizer folder and the same chat template in both; --chat applies the one of the base model",
)
def different_prompts(prompts: int, token: int, total: int) -> str:
    """The same text became other token ids.

    Why it matters: the adapter was trained on one form of the prompt, with its template and its special tokens. Another
    template, another tokenizer, or a second beginning-of-sequence token makes it answer differently, with every weight
    right.

    How it is seen: both runs have the text of the prompt, and their token ids differ.
    """
    counted = f"{prompts} of {total} prompts" if total > 1 else "the prompt"
    where = f"first at token {token + 1}" if prompts == 1 else f"the first one at token {token + 1}"
    return f"{counted} became other token ids, {where}"


@rule(
    "LP627",
    "different-bases",
    "applied",
    "wrong",
    hint="serve the model that the adapter was trained on, in the same dtype, unquantised or quantised alike",
)
def different_bases(why: str) -> str:
    """The base models differ, without any adapter.

    Why it matters: an adapter changes a model relative to its own base. On another version, another quantisation, or a
    merged base its effect is arbitrary.

    How it is seen: the answers of the base model differ by more than rounding; or the first module's input does, before
    any module of the adapter; or a later one's, while all modules of the adapter before it are right.
    """
    return f"the base models differ: {why}"


@rule(
    "LP628",
    "not-deterministic",
    "applied",
    "wrong",
    hint="set a seed and a temperature of 0, switch off sampling and racing kernels, then compare again",
)
def not_deterministic(side: str, error: float, cross: float) -> str:
    """The same request, repeated in one run, differs from itself.

    Why it matters: two runs cannot agree better than each agrees with itself. Until an engine is deterministic, no
    difference between two engines can be blamed on anything.

    How it is seen: a run answered the same tokens several times, with other log-probabilities.
    """
    return (
        f"the {side} does not agree with itself: log-probabilities of the same request differ by {error:.2g}, "
        f"and between the runs by {cross:.2g}"
    )


@rule(
    "LP629",
    "unexplained-difference",
    "agrees",
    "wrong",
    hint="record both runs with --keep tensors, in float32 if the engine can, and compare again",
)
def unexplained_difference(what: str) -> str:
    """The runs differ by more than rounding, and nothing that the traces hold explains it.

    Why it matters: weights, routing and the engines' own arithmetic are the same, as far as they were measured. What is
    left are layers without an adapter: attention, normalisation, rotary embeddings, and their kernels.

    How it is seen: the input x of a module differs, and no module of the adapter before it is off.
    """
    return what
