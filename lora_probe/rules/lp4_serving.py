"""LP4xx: the adapter compared with an engine's options and limits. Out: why a load is refused, or what it ignores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_probe.adapter import AdapterModule
from lora_probe.adapter.variants import (
    ALPHA_PATTERN,
    BY_FIELD,
    NOT_MERGED,
    RANK_PATTERN,
    UNKNOWN_INITIALISATION_REFUSED,
    initialisation,
    variants_of,
)
from lora_probe.base.engine_view import CLASSIFIER_HEADS
from lora_probe.files import brief, shown
from lora_probe.names import Key
from lora_probe.rules.registry import AdapterFinding, Family, rule, survey
from lora_probe.rules.vllm_versions import Behaviour

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

FAMILY = Family("LP4", "serving", commands="check, some also by trace", loading_step=1)

DEFAULT_MAX_RANK = 16
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's `--max-lora-rank` accepts (`MaxLoRARanks` in vllm/config/lora.py)."""


def enough(rank: int) -> int:
    """The smallest `--max-lora-rank` that admits a rank of up to the largest of MAX_RANKS."""
    return next(size for size in MAX_RANKS if size >= rank)


@rule(
    "LP401",
    "refused-by-engine",
    "load",
    "absent",
    hint="read the engine's message: it states what is not accepted; a limit is often an option (--max-lora-rank R)",
)
def refused(message: str) -> str:
    """The engine refused the whole adapter.

    Why it matters: nothing of the adapter is served, but at least the engine reports it. The cause is often an option
    of the engine (`--max-lora-rank`), sometimes a feature that it does not support (DoRA, modules_to_save).

    Example: `LoRA rank 64 is greater than max_lora_rank 16`: start the engine with `--max-lora-rank 64`.
    """
    return message


@survey(
    "LP402",
    "rank-above-limit",
    engines=("vllm",),
    hint="start vLLM with a larger --max-lora-rank: 1, 8, 16, 32, 64, 128, 256, 320 or 512",
)
def rank_above_limit(subject: Subject) -> Iterator[AdapterFinding]:
    """The adapter's rank is above `--max-lora-rank`, or above the highest value that vLLM accepts.

    What it does: checks the largest of `r` and rank_pattern, as vLLM does, and the rank of the tensors, which vLLM
    does not check before it copies them.

    Why it matters: vLLM 0.32 refuses the adapter (`LoRA rank 32 is greater than max_lora_rank 16`). If only the
    tensors are larger, it fails while it fills the slot, with an error that does not name the cause.

    References: vllm-project/vllm#2847, unslothai/unsloth#2097.
    """
    limit = subject.serving.max_lora_rank or MAX_RANKS[-1]
    config, field = _config_rank(subject)
    held = max((_held_rank(pair) for pair in subject.adapter.modules), default=0)
    if config > limit:
        above = tuple(p.key for p in subject.adapter.modules if max(p.config_rank, _held_rank(p)) > limit)
        message = f"LoRA rank {config} is greater than max_lora_rank {limit}"
        yield AdapterFinding(message, keys=above, refuses=True, field=field)
    elif held > limit:
        yield AdapterFinding(f"the tensors have rank {held}, more than max_lora_rank {limit}", refuses=True)


def _held_rank(pair: AdapterModule) -> int:
    """The rank of two matrices that fit together; 0 for anything else."""
    if pair.a is None or pair.b is None or pair.parameter != "weight":
        return 0
    fits = len(pair.a.shape) == 2 and len(pair.b.shape) == 2 and pair.a.shape[0] == pair.rank_of_b
    return pair.a.shape[0] if fits else 0


def _config_rank(subject: Subject) -> tuple[int, str]:
    """The largest rank that this vLLM reads from the config, and the key that holds it."""
    config, version = subject.adapter.config, subject.serving.vllm
    patterns = config.rank_pattern.values() if version.at_least(RANK_PATTERN.vllm_applies) else ()
    largest = max(patterns, default=0)
    return (largest, "rank_pattern") if largest > config.rank else (config.rank, "r")


@survey(
    "LP403",
    "needs-max-lora-rank",
    severity="warning",
    engines=("vllm",),
    hint="start vLLM with --max-lora-rank, and pass it here as well",
)
def needs_max_rank(subject: Subject) -> Iterator[AdapterFinding]:
    """The adapter's rank is above vLLM's default of 16, and `--max-lora-rank` was not passed here.

    Why it matters: vLLM refuses the adapter unless it is started with a large enough `--max-lora-rank`. The prediction
    assumes it is.
    """
    config, field = _config_rank(subject)
    if subject.serving.max_lora_rank is None and DEFAULT_MAX_RANK < config <= MAX_RANKS[-1]:
        yield AdapterFinding(
            f"rank {config} needs `--max-lora-rank {enough(config)}`: vLLM's default is {DEFAULT_MAX_RANK}", field=field
        )


@rule(
    "LP404",
    "outside-target-filter",
    "placed",
    "absent",
    engines=("vllm",),
    hint="add the module to --lora-target-modules, or remove the option",
)
def outside_filter(targets: tuple[str, ...]) -> str:
    """`--lora-target-modules` excludes the module.

    Why it matters: the option limits which layers vLLM wraps, but loading an adapter does not check it. The pairs of
    the other modules, or all pairs, are silently dropped ({vllm}).

    References: vllm-project/vllm#55193.
    """
    return f"--lora-target-modules is {' '.join(targets)}"


@survey(
    "LP405",
    "dtype-of-lora",
    severity="warning",
    engines=("vllm",),
    hint="use the same 16-bit dtype for both on a GPU; on a CPU there is no problem",
)
def lora_dtype(subject: Subject) -> Iterator[AdapterFinding]:
    """`--dtype` and `--lora-dtype` do not work together on a GPU.

    Why it matters: vLLM's GPU kernels for LoRA accept float16 and bfloat16, and the layer's input and the adapter must
    have the same one. Anything else fails with an AssertionError at the first token, not when the adapter is loaded
    (known from the source of 0.32).

    References: vllm-project/vllm#28640.
    """
    model, lora = subject.serving.dtype, subject.serving.lora_dtype
    if "float32" in (model, lora):
        yield AdapterFinding("vLLM's LoRA kernels on a GPU accept only float16 and bfloat16, not float32")
    elif model and lora and "auto" not in (model, lora) and model != lora:
        yield AdapterFinding(
            f"--dtype is {model}, --lora-dtype is {lora}: vLLM's LoRA kernels on a GPU require the same"
        )


UNMERGED = "serve it with PEFT, which cannot merge it either"


@survey(
    "LP406",
    "variant-refused",
    engines=("vllm",),
    explains=("LP210",),
    hint="serve it with PEFT, or merge it into the base model first: merge_and_unload(), then `lora-probe parity`",
)
def variant_refused(subject: Subject) -> Iterator[AdapterFinding]:
    """The config enables a LoRA variant that vLLM does not support.

    What it does: repeats `PEFTHelper.validate_legal` of the vLLM version that will serve it: DoRA, biases,
    modules_to_save other than a classification head, and from 0.32 on lora_bias, initialisations that change the base
    model (PiSSA, OLoRA, CorDA, LoftQ, and any value that vLLM does not know), aLoRA, layer_replication, BD-LoRA,
    QALoRA.

    Why it matters: vLLM refuses the adapter. The fix that its message suggests (set init_lora_weights to true) is
    right only if the served base model already contains the change.

    References: vllm-project/vllm#10849, #4186, #9280, huggingface/transformers#34468.
    """
    raw, version = subject.adapter.config.raw, subject.serving.vllm
    for field, message in _refusals(raw, version):
        variant = BY_FIELD.get(field)
        hint = UNMERGED if variant is not None and variant.not_replayed == NOT_MERGED else ""
        yield AdapterFinding(message, refuses=True, field=field, hint=hint)


def _refusals(raw: Any, vllm: Behaviour) -> Iterator[tuple[str, str]]:
    saved = raw.get("modules_to_save") or ()
    unsupported = [name for name in saved if not vllm.classification_heads or name not in CLASSIFIER_HEADS]
    if unsupported:
        names = ", ".join(map(shown, unsupported[:MOST_NAMES]))
        more = f" and {len(unsupported) - MOST_NAMES} more" if len(unsupported) > MOST_NAMES else ""
        yield "modules_to_save", f"vLLM does not support modules_to_save {names}{more}"
    if raw.get("bias", "none") != "none":
        yield "bias", f"vLLM does not support an adapter's bias (`bias` is {brief(raw['bias'])})"
    floats = [key for key, value in (raw.get("rank_pattern") or {}).items() if not isinstance(value, int)]
    if floats and vllm.at_least(RANK_PATTERN.vllm_applies):
        yield (
            "rank_pattern",
            f"vLLM requires integer ranks, but rank_pattern has another value for `{shown(floats[0])}`",
        )
    for variant in variants_of(raw):
        if vllm.at_least(variant.vllm_refuses):
            yield variant.field, f"vLLM does not support {variant.described}"
    init = raw.get("init_lora_weights")
    row = initialisation(init)
    if isinstance(init, str) and vllm.at_least(row.vllm_refuses if row is not None else UNKNOWN_INITIALISATION_REFUSED):
        yield "init_lora_weights", f"vLLM does not support init_lora_weights {brief(init)}"


MOST_NAMES = 10
"""Names of a list that a message shows."""


@survey(
    "LP407",
    "ignored-by-this-vllm",
    engines=("vllm",),
    hint="upgrade vLLM to 0.32, which applies or refuses it",
)
def ignored_by_version(subject: Subject) -> Iterator[AdapterFinding]:
    """This version of vLLM ignores a field that changes what the adapter computes.

    What it does: checks the fields that vLLM up to 0.31 does not read: rank_pattern, alpha_pattern, initialisations
    that change the base model, lora_bias, aLoRA, layer_replication, BD-LoRA, QALoRA.

    Why it matters: the adapter runs silently, with the general scaling for the modules of the patterns, and as plain
    LoRA for the variants. Measured on 0.31, in log-probabilities: alpha_pattern off by 0.87, PiSSA by 0.40, lora_bias
    by 1.01. 0.32 applies the patterns and refuses the others.
    """
    config, version = subject.adapter.config, subject.serving.vllm
    for pattern in (RANK_PATTERN, ALPHA_PATTERN):
        keys = tuple(_scaled_otherwise(subject)) if config.raw.get(pattern.field) else ()
        if keys and not version.at_least(pattern.vllm_applies):
            message = f"vLLM {version.version} ignores {pattern.field} and scales by {config.scaling:g}"
            yield AdapterFinding(message, keys=keys, value="wrong", field=pattern.field)
            break
    ignored = [
        (variant.field, variant.described)
        for variant in variants_of(config.raw)
        if variant.vllm_refuses and not version.at_least(variant.vllm_refuses)
    ]
    init = config.raw.get("init_lora_weights")
    row = initialisation(init)
    if row is not None and row.changes_base and not version.at_least(row.vllm_refuses):
        ignored.append(("init_lora_weights", f"init_lora_weights {brief(init)}, which changes the base model"))
    for field, name in ignored:
        yield AdapterFinding(f"vLLM {version.version} ignores {name} and runs the adapter as plain LoRA", field=field)


def _scaled_otherwise(subject: Subject) -> Iterator[Key]:
    general = subject.adapter.config.scaling
    for pair in subject.adapter.modules:
        if abs(pair.scaling - general) > 1e-9 * abs(general):
            yield pair.key


@survey(
    "LP408",
    "vocabulary-above-limit",
    engines=("vllm",),
    needs="base",
    hint="merge the adapter: vLLM cannot be started with --enable-lora on this base model",
)
def vocabulary_above_limit(subject: Subject) -> Iterator[AdapterFinding]:
    """The base model's vocabulary is too large for vLLM's kernel for an adapted output head.

    What it does: reports vLLM's own error from creating its LoRA layers for this base model.

    Why it matters: if the class adapts lm_head, the engine does not start with `--enable-lora`, for any adapter
    (`vocab size must be <= 258048`, 0.32).
    """
    if "vocab size must be" in (error := subject.unasked.get("vllm", "")):
        yield AdapterFinding(error, refuses=True)


@survey(
    "LP409",
    "head-without-home",
    engines=("vllm",),
    needs="vllm",
    hint="serve it as the classifier that it was trained as (--runner pooling), with a base model that has the head",
)
def head_without_home(subject: Subject) -> Iterator[AdapterFinding]:
    """The file holds a trained classification head, but vLLM's model of this base model does not have one.

    Why it matters: vLLM 0.32 refuses the adapter (`Cannot load full module 'score': the model does not expose a unique
    ClassificationHeadWithLoRA`). It accepts heads on pooling models of the cross-encoder type.

    References: vllm-project/vllm#53555, #12075.
    """
    saved = set(subject.adapter.config.raw.get("modules_to_save") or ())
    view = subject.views["vllm"]
    if view.refuses:
        return
    homes = {name.rpartition(".")[2] for name, module in view.modules.items() if not module.why_not}
    for name in subject.adapter.weights.tensors:
        parts = name.split(".")
        if len(parts) > 1 and parts[-2] in CLASSIFIER_HEADS and parts[-2] in saved and parts[-2] not in homes:
            yield AdapterFinding(
                f"`{shown(name)}`: vLLM's {shown(view.model)} has no classification head", refuses=True
            )
            return


@survey(
    "LP411",
    "class-without-adapters",
    engines=("vllm",),
    needs="vllm",
    hint="merge the adapter: merge_and_unload(), then `lora-probe parity`",
)
def class_without_adapters(subject: Subject) -> Iterator[AdapterFinding]:
    """vLLM does not serve this base model, or not with adapters.

    What it does: builds vLLM's model and its LoRA manager without weights. `check` judges such an adapter for vLLM only
    if `--engine` names it.

    Why it matters: without a class for the model vLLM does not start; with a class that does not support LoRA it does
    not start with `--enable-lora` (`... does not support LoRA yet`, 0.32), for any adapter.

    Example: T5; GPT-2.
    """
    view = subject.views["vllm"]
    if view.refuses:
        hint = "" if view.modules else "serve it with PEFT: vLLM cannot serve the merged model either"
        yield AdapterFinding(view.refuses, refuses=True, hint=hint)


@rule(
    "LP410",
    "engines-differ",
    "adapter",
    "wrong",
    hint="fix the modules that one engine loses, or use the engine that the adapter was trained with",
    consequence=True,
    follows=("LP301",),
)
def engines_differ(engines: str, count: int, total: int, only: str) -> str:
    """PEFT and vLLM will run different adapters.

    What it does: compares the two predicted ledgers, module by module.

    Why it matters: PEFT decides from adapter_config.json what to adapt, vLLM from the names of the tensors. If the two
    disagree, the engines run different functions and neither reports it: an evaluation with one does not tell how the
    other performs.

    Example: keys without `base_model.model.`, which vLLM applies and PEFT drops.
    """
    return f"{engines} will run different adapters: {count} of {total} modules {only}"
