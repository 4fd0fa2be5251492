"""LP2xx: what the file alone shows of a pair. In: the config, the pair, its spectrum. Out: `stored`."""

from __future__ import annotations

from lora_probe.adapter import AdapterConfig, AdapterModule
from lora_probe.adapter.spectrum import Spectrum
from lora_probe.adapter.variants import EXTRAS
from lora_probe.files import brief
from lora_probe.precision import FLOATS
from lora_probe.rules.registry import Sentence, rule


@rule(
    "LP201",
    "rank-differs-from-config",
    "stored",
    "wrong",
    hint="write the rank of the tensors into `r` (or `rank_pattern`) of adapter_config.json, or save again",
)
def rank_differs(pair: AdapterModule, config: AdapterConfig) -> Sentence | None:
    """The tensors have another rank than the config gives their module.

    Why it matters: the scaling is `lora_alpha / r` of the *config*, so an engine that believes both runs the pair
    at the wrong strength. vLLM ({vllm}) never compares the two: it answers normally, at the wrong scale.
    PEFT 0.21 refuses the checkpoint with a size mismatch.

    Example: `r: 8`, `lora_alpha: 16`, and `lora_A` of shape `[4, 576]`: trained with scaling 4, served with 2.

    Mend: put the rank of the tensors into the config. References: huggingface/peft#1746.
    """
    rank = pair.rank
    if pair.parameter != "weight":
        # Fused experts keep the ranks of all experts in one matrix.
        return None
    if pair.a is None or pair.b is None or rank is None or rank == pair.config_rank:
        return None
    alpha = pair.scaling * (pair.config_rank**0.5 if config.rslora else pair.config_rank)
    meant = alpha / (rank**0.5 if config.rslora else rank)
    return Sentence(
        f"r={pair.config_rank} in the config, rank {rank} in the tensors, "
        f"so vLLM scales by {pair.scaling:g} instead of {meant:g}",
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
    """A module has only one of lora_A and lora_B in the file.

    Why it matters: there is no ΔW without both. vLLM 0.32 without lora_A adds nothing and says nothing; without
    lora_B it dies with a TypeError that names nothing. PEFT 0.21 warns, and without lora_A multiplies the trained
    lora_B with a random one: two loads of one file differ.

    Mend: look for the key filter that dropped the half, and save again.
    """
    if pair.a is None:
        return "lora_B is in the file, lora_A is not"
    return "lora_A is in the file, lora_B is not" if pair.b is None else None


@rule(
    "LP220",
    "variant-tensor-missing",
    "stored",
    "wrong",
    hint="save the adapter again: the tensor was trained and is not in the file, or the flag is another run's",
)
def variant_missing(pair: AdapterModule, config: AdapterConfig) -> Sentence | None:
    """The config asks for a variant of LoRA that has a third tensor for every module, and a module has none.

    What it does: magnitude vectors with `use_dora`, biases of lora_B with `lora_bias`, diagonals with `kasa_config`.

    Why it matters: that part of the training is gone. PEFT 0.21 warns of missing keys and computes magnitudes anew, or
    starts a bias at zero, so the module runs as another function than the trained one. vLLM refuses the flag (LP406).

    Example: tensors deleted so that vLLM takes the file; `use_dora: true` written by hand.
    """
    if pair.parameter != "weight" or pair.embedding:
        return None
    for field, extra in EXTRAS.items():
        if config.raw.get(field) and not any(extra.is_named(tensor.name) for tensor in pair.extras):
            return Sentence(f"`{field}` is set, and the file has no {extra.word} for it", field)
    return None


@rule(
    "LP203",
    "zero-delta",
    "stored",
    "absent",
    hint="lora_B is zero: never trained, or a fresh adapter was saved. Where lora_alpha is 0, write the trained value",
)
def zero_delta(pair: AdapterModule, spectrum: Spectrum, config: AdapterConfig) -> str | Sentence | None:
    """ΔW = s·B·A is exactly zero.

    Why it matters: every engine loads and multiplies it, reports success, and the module behaves as the base.
    lora_B starts at zero, so this is what an adapter that never saw a gradient looks like.

    Mend: check which parameters were trainable; a fresh adapter from `get_peft_model` in place of
    `PeftModel.from_pretrained` looks the same. References: huggingface/peft#793, huggingface/peft#1402.
    """
    if spectrum.norm != 0:
        return None
    if pair.scaling:
        return "ΔW is exactly zero"
    field = config.alpha_field_of(pair.pattern_name)
    why = "lora_alpha is 0" if field == "lora_alpha" else f"{field} sets lora_alpha to 0"
    return Sentence(f"ΔW is exactly zero, as {why}", field)


@rule(
    "LP204",
    "not-in-the-file",
    "stored",
    "absent",
    hint="save the adapter again; if the module was not meant, take it out of target_modules",
    consequence=True,
    predicate=True,
)
def not_in_file() -> str:
    """The config targets a module of the base, and the file holds no pair for it.

    Why it matters: vLLM ({vllm}) serves the base there and says nothing; PEFT 0.21 warns of missing keys and
    runs an untrained pair, which is the base as well.

    Example: one layer of thirty lost in a sharded save: 87 of 90 modules took effect.

    Mend: save again with all ranks gathered, or correct target_modules.
    """
    return "not in the file"


@rule(
    "LP205",
    "not-finite",
    "stored",
    "wrong",
    hint="training diverged or float16 overflowed: go back to an earlier checkpoint",
)
def not_finite(spectrum: Spectrum) -> str | None:
    """A or B holds NaN or infinity.

    Why it matters: both engines load it without a word; in vLLM every log-probability becomes NaN and the text
    turns into one repeated token.

    Mend: use a checkpoint from before the loss diverged. References: predibase/lorax#81.
    """
    return None if spectrum.finite else "A or B holds NaN or infinity"


@rule(
    "LP206",
    "not-a-matrix",
    "stored",
    "wrong",
    hint="the tensors were saved from a sharded model without gathering, or in a quantised form: save again",
)
def not_a_matrix(pair: AdapterModule) -> str | None:
    """A or B is not a two-dimensional float matrix, or their ranks disagree.

    Why it matters: shards that were saved without gathering are flat or empty. vLLM 0.32 dies at the first request
    with an IndexError that names no tensor; PEFT 0.21 says size mismatch.

    Mend: gather before saving (ZeRO-3, FSDP). References: huggingface/peft#2500, huggingface/accelerate#3508.
    """
    for half, tensor in (("lora_A", pair.a), ("lora_B", pair.b)):
        if tensor is None:
            continue
        if len(tensor.shape) != 2 or 0 in tensor.shape:
            return f"{half} has the shape {_text(tensor.shape)}, not that of a matrix"
        if tensor.dtype not in FLOATS:
            return f"{half} is {tensor.dtype}, not a float"
    if pair.a is not None and pair.b is not None and pair.a.shape[0] != pair.b.shape[1]:
        return f"lora_A has rank {pair.a.shape[0]}, lora_B has rank {pair.b.shape[1]}"
    return None


def _text(shape: tuple[int, ...]) -> str:
    """The shape as Python writes a list; a file can give a tensor 64 axes."""
    return str(list(shape)) if len(shape) < 6 else brief(list(shape))
