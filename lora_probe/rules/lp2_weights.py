"""LP2xx: what the file alone shows about a pair. In: the config, the pair, its spectrum. Out: `stored`."""

from __future__ import annotations

from lora_probe.adapter import AdapterConfig, AdapterModule
from lora_probe.adapter.pair_values import extra_of
from lora_probe.adapter.spectrum import Spectrum
from lora_probe.adapter.variants import EXTRAS
from lora_probe.files import brief
from lora_probe.rules.registry import Sentence, rule


@rule(
    "LP201",
    "rank-differs-from-config",
    "stored",
    "wrong",
    hint="restore the adapter_config.json that was saved with these weights; do not change `r` alone: it changes the "
    "scaling, and `lora_alpha` belongs to it",
    explains=("LP402",),
)
def rank_differs(pair: AdapterModule, config: AdapterConfig) -> Sentence | None:
    """The rank of the tensors differs from the rank that the config sets for their module.

    Why it matters: the config is not the one of the training, and the scaling is `lora_alpha / r` of the *config*.
    vLLM ({vllm}) never compares the ranks: it answers normally, at whatever scale the config gives. PEFT 0.21 refuses
    the checkpoint with a size mismatch.

    Example: `r: 16`, `lora_alpha: 32`, and `lora_A` of shape `[8, 576]`. If the training used r 8 and alpha 16, the
    scaling 2 is right; writing 8 into `r` alone would double it to 4.

    Fix: restore the adapter_config.json that was saved with these weights. Otherwise look up `r` and `lora_alpha` in
    the training script, and write both: the rank is visible in the tensors, the alpha is not.

    References: huggingface/peft#1746.
    """
    rank = pair.rank
    if pair.parameter != "weight":
        # Fused experts keep the ranks of all experts in one matrix.
        return None
    if pair.a is None or pair.b is None or rank is None or rank == pair.config_rank:
        return None
    return Sentence(
        f"r={pair.config_rank} in the config, rank {rank} in the tensors, "
        f"so the config's scaling of {pair.scaling:g} may be wrong",
        field=config.rank_field_of(pair.pattern_name),
    )


@rule(
    "LP202",
    "half-a-pair",
    "stored",
    "wrong",
    hint="save the adapter again: both lora_A and lora_B of a module are needed",
)
def half_missing(pair: AdapterModule) -> str | None:
    """The file holds only one of lora_A and lora_B for a module.

    Why it matters: ΔW needs both. If lora_A is missing, vLLM 0.32 silently adds nothing; if lora_B is missing, it
    fails with a TypeError that does not name the tensor. PEFT 0.21 warns, and if lora_A is missing, multiplies the
    trained lora_B with a random one: two loads of the same file differ.

    Fix: find the key filter that dropped the half, and save again.
    """
    if pair.a is None:
        return "it has lora_B, but not lora_A"
    return "it has lora_A, but not lora_B" if pair.b is None else None


@rule(
    "LP220",
    "variant-tensor-missing",
    "stored",
    "wrong",
    hint="save the adapter again with the missing tensor, or remove the flag if it is from another run",
    explains=("LP406",),
)
def variant_missing(pair: AdapterModule, config: AdapterConfig) -> Sentence | None:
    """The config enables a LoRA variant with a third tensor for every module, but a module lacks that tensor.

    What it does: looks for magnitude vectors with `use_dora`, biases of lora_B with `lora_bias`, diagonals with
    `kasa_config`.

    Why it matters: that part of the training is missing. PEFT 0.21 warns of missing keys and computes new magnitudes,
    or starts a bias at zero, so the module computes something else than in training. vLLM refuses the flag (LP406).

    Example: tensors deleted to make vLLM accept the file; `use_dora: true` written by hand.
    """
    if pair.parameter != "weight" or pair.embedding:
        return None
    for field, extra in EXTRAS.items():
        if config.raw.get(field) and not extra.in_training and extra_of(pair, field) is None:
            return Sentence(f"`{field}` is set, but the module has no {extra.word}", field)
    return None


@rule(
    "LP203",
    "zero-delta",
    "stored",
    "absent",
    hint="train the adapter or save the trained one: lora_B is zero; if lora_alpha is 0, write the trained value",
)
def zero_delta(pair: AdapterModule, spectrum: Spectrum, config: AdapterConfig) -> str | Sentence | None:
    """ΔW = s·B·A is exactly zero.

    Why it matters: every engine loads and multiplies the pair and reports success, and the module behaves as in the
    base model. lora_B starts at zero, so an adapter that never received a gradient looks like this.

    Fix: check which parameters were trainable. A fresh adapter from `get_peft_model`, saved or loaded where
    `PeftModel.from_pretrained` was needed, looks the same.

    References: huggingface/peft#793, huggingface/peft#1402.
    """
    if spectrum.norm != 0:
        return None
    if pair.scaling:
        return "ΔW is exactly zero"
    field = config.alpha_field_of(pair.pattern_name)
    why = "lora_alpha is 0" if field == "lora_alpha" else f"{field} sets lora_alpha to 0"
    return Sentence(f"ΔW is exactly zero because {why}", field)


@rule(
    "LP204",
    "not-in-the-file",
    "stored",
    "absent",
    hint="save the adapter again, or push all of it; if the module was not trained, add its path to exclude_modules",
    consequence=True,
    predicate=True,
    follows=("LP301",),
)
def not_in_file(source: str = "the file") -> str:
    """The config targets a module of the base model, but the file has no pair for it.

    Why it matters: vLLM ({vllm}) silently serves the base model there; PEFT 0.21 warns of missing keys and runs an
    untrained pair, which behaves like the base model too.

    Example: one layer of thirty lost in a sharded save: 87 of 90 modules took effect.

    Fix: save again with all ranks gathered, or correct target_modules.
    """
    return f"not in {source}"


@rule(
    "LP205",
    "not-finite",
    "stored",
    "wrong",
    hint="go back to an earlier checkpoint: training diverged or float16 overflowed",
)
def not_finite(spectrum: Spectrum) -> str | None:
    """A or B contains NaN or infinity.

    Why it matters: both engines load it silently; in vLLM every log-probability becomes NaN and the text turns into
    one repeated token.

    Fix: use a checkpoint from before the loss diverged.

    References: predibase/lorax#81.
    """
    return None if spectrum.finite else "A or B contains NaN or infinity"


@rule(
    "LP206",
    "not-a-matrix",
    "stored",
    "wrong",
    hint="gather the weights of a sharded model, and save the adapter again",
)
def not_a_matrix(pair: AdapterModule) -> str | None:
    """A or B is not a matrix, nor are both the kernels of a convolution, or their ranks disagree.

    Why it matters: shards that were saved without gathering are flat or empty. vLLM 0.32 fails at the first request
    with an IndexError that does not name a tensor; PEFT 0.21 reports a size mismatch.

    Fix: gather the weights before saving (ZeRO-3, FSDP).

    References: huggingface/peft#2500, huggingface/accelerate#3508.
    """
    if pair.convolution:
        return None
    for half, tensor, blocks in zip(("lora_A", "lora_B"), (pair.a, pair.b), pair.blocks, strict=True):
        if tensor is None:
            continue
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            return f"{half} has shape {_text(tensor.shape)}, which is not a matrix"
        if tensor.shape[0] % blocks:
            return f"{half} has {tensor.shape[0]} rows, which are not {blocks} blocks"
    if pair.a is not None and pair.b is not None and pair.a.shape[0] != pair.rank_of_b:
        return f"lora_A has rank {pair.a.shape[0]}, lora_B has rank {pair.rank_of_b}"
    return None


def _text(shape: tuple[int, ...]) -> str:
    """The shape as a Python list, shortened: a tensor in a file may have 64 axes."""
    return str(list(shape)) if len(shape) < 6 else brief(list(shape))
