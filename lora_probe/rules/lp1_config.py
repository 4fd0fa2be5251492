"""LP1xx: what adapter_config.json shows. In: a `Subject`, or what reading it said. Out: refusals and findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_probe.adapter.variants import BY_FIELD, INITIALISATIONS, initialisation
from lora_probe.files import brief, shown
from lora_probe.rules.paths import listed
from lora_probe.rules.registry import AdapterFinding, Family, rule, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

FAMILY = Family("LP1", "adapter_config.json", commands="check", loading_step=0)

REQUIRED = ("r", "lora_alpha", "target_modules")
"""vLLM's `PEFTHelper.from_dict` asks for these; PEFT has defaults."""
MOST_KEYS = 10
"""Keys of a config that get a finding each from a rule that is about each key; one more finding is about the rest."""


@rule(
    "LP101",
    "config-unreadable",
    "adapter",
    "absent",
    hint="write the config again: PEFT's save_pretrained makes both files",
)
def config_unreadable(message: str) -> str:
    """adapter_config.json is missing, not JSON, or holds a field of the wrong kind.

    What it does: reads the file as PEFT and vLLM do, bounded, and checks the kind of every field that decides which
    modules are meant and how strongly.

    Why it matters: nothing can be loaded. vLLM 0.32 calls a missing config `No adapter found`, which sounds like a
    wrong path; PEFT 0.21 takes the path for the name of a repository.

    Example: a Git LFS pointer or an HTML page in place of the JSON; `"r": "8"`.

    Mend: save or download the adapter again. References: unslothai/unsloth#1191.
    """
    return message


@rule(
    "LP102",
    "not-a-lora-adapter",
    "adapter",
    "absent",
    hint="convert it with the library that wrote it, or point at the PEFT adapter",
)
def not_lora(message: str) -> str:
    """A file called adapter_config.json that is not the config of a PEFT LoRA adapter.

    What it does: tells apart what real folders hold under that name: MLX, AdapterHub, prefix tuning and other PEFT
    methods, a whole model's config, somebody's own keys.

    Why it matters: vLLM 0.32 looks at three keys (r, lora_alpha, target_modules) and never at `peft_type`, so another
    method's config that has them is loaded as LoRA.

    Mend: convert the adapter to PEFT's format.
    """
    return message


@survey(
    "LP103",
    "field-missing",
    hint="write the value that the adapter was trained with; the training script or its log has it",
)
def field_missing(subject: Subject) -> Iterator[AdapterFinding]:
    """A field that an engine requires is not in the config.

    What it does: asks for `r`, `lora_alpha` and `target_modules`, which vLLM requires, and for `peft_type`, which PEFT
    does.

    Why it matters: vLLM 0.32 refuses the adapter (`Missing required configuration fields`). PEFT 0.21 loads it in
    silence with its own defaults (r 8, lora_alpha 8, for target_modules a table of its own by the kind of model), which
    are the wrong scaling and the wrong modules if the adapter had others. Without `peft_type` PEFT dies with a
    KeyError, and vLLM does not mind.

    Example: a converter that forgot `lora_alpha`. References: NVIDIA/TensorRT-LLM#1477, Blaizzy/mlx-vlm#845.

    Mend: write the trained value into adapter_config.json.
    """
    config = subject.adapter.config
    missing = [name for name in REQUIRED if name not in config.raw]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        assumed = f"PEFT assumes r {config.rank} and lora_alpha {config.alpha:g}"
        yield AdapterFinding(
            f"the config has no {names} ({assumed})", engines=("vllm",), refuses=True, path=config.path
        )
    if "peft_type" not in config.raw:
        yield AdapterFinding("the config has no `peft_type`", engines=("peft",), refuses=True, path=config.path)


@survey(
    "LP104",
    "key-twice",
    severity="warning",
    hint="delete the one that is not meant: of two, the last counts",
)
def key_twice(subject: Subject) -> Iterator[AdapterFinding]:
    """A key stands more than once in adapter_config.json.

    Why it matters: Python's JSON reader, which PEFT and vLLM use, takes the last one without a word; another reader may
    take the first.

    Mend: delete one.
    """
    config = subject.adapter.config
    for key in config.repeated[:MOST_KEYS]:
        yield AdapterFinding(f"`{shown(key)}` stands more than once; {brief(config.raw.get(key))} counts", field=key)
    if rest := config.repeated[MOST_KEYS:]:
        yield AdapterFinding(f"{listed(rest)} stand more than once; the last of each counts", field=rest[0])


@survey(
    "LP109",
    "init-lost-on-load",
    hint="convert it while the training run is there: save_pretrained(path_initial_model_for_weight_conversion=...)",
    field="init_lora_weights",
)
def init_lost(subject: Subject) -> Iterator[AdapterFinding]:
    """The initialisation changed the base by something that no engine can compute again.

    What it does: looks for `lora_ga` and for `pissa_niter_N` in init_lora_weights.

    Why it matters: the adapter was trained on a base from which its own initial part had been taken out. LoRA-GA
    takes it out while training only: PEFT 0.21 and vLLM 0.32 load it on the whole base and say nothing (measured 1.03
    off in log-probabilities, where the model had been equal to the base). `pissa_niter_N` computes the part with a
    random method: PEFT gets another base at every load (0.05 off, twice the trained signal), vLLM 0.32 refuses it.

    Mend: save it with `path_initial_model_for_weight_conversion`, which makes a plain LoRA adapter of it.
    References: huggingface/peft#1929.
    """
    init = subject.adapter.config.raw.get("init_lora_weights")
    row = initialisation(init)
    if row is None:
        return
    if row.base == "in training":
        yield AdapterFinding(f"init_lora_weights is `{shown(str(init))}`: the part taken out of the base is lost")
    elif row.base == "random":
        yield AdapterFinding(
            f"init_lora_weights is `{shown(str(init))}`: PEFT computes another base at every load",
            engines=("peft",),
        )


@survey(
    "LP111",
    "unknown-init",
    engines=("peft",),
    hint="write `true`: an initialisation says how training began, and a saved adapter needs none",
    field="init_lora_weights",
)
def unknown_init(subject: Subject) -> Iterator[AdapterFinding]:
    """init_lora_weights is a word that PEFT does not know.

    Why it matters: PEFT 0.21 refuses (`Unknown initialization`), although the word means nothing for a trained adapter;
    vLLM 0.32 refuses every word that it does not know (LP406).

    Example: `"gausian"`; a word that a newer PEFT knows.
    """
    init = subject.adapter.config.raw.get("init_lora_weights")
    if not init or init is True:
        return
    if isinstance(init, str) and any(row.accepts(init) for row in INITIALISATIONS):
        return
    yield AdapterFinding(f"PEFT does not know init_lora_weights {brief(init)}", refuses=True)


@survey(
    "LP112",
    "value-that-peft-refuses",
    engines=("peft",),
    hint="write the value that PEFT's documentation of LoraConfig gives; vLLM does not look at most of these",
)
def refused_value(subject: Subject) -> Iterator[AdapterFinding]:
    """A field of the config has a value with which PEFT cannot load the adapter.

    What it does: mirrors what `LoraConfig` and the building of the layers check in PEFT 0.21: the task, the bias, the
    dropout, a rank that is a float, layers_to_transform beside an expression, layers_pattern without
    layers_to_transform, patterns that are null.

    Why it matters: PEFT refuses, and vLLM loads the adapter, as it does not read these fields.

    Example: `"task_type": "causal_lm"`; `"r": 8.0`, as some converters write it.
    """
    raw = subject.adapter.config.raw
    for field, wrong in (
        ("task_type", raw.get("task_type") is not None and raw["task_type"] not in TASKS),
        ("bias", "bias" in raw and raw["bias"] not in ("none", "all", "lora_only")),
        ("r", isinstance(raw.get("r"), float)),
        ("rank_pattern", "rank_pattern" in raw and not _whole_numbers(raw["rank_pattern"])),
        ("alpha_pattern", "alpha_pattern" in raw and not isinstance(raw["alpha_pattern"], dict)),
        ("lora_dropout", "lora_dropout" in raw and not _share(raw["lora_dropout"])),
        ("trainable_token_indices", raw.get("trainable_token_indices") == []),
    ):
        if wrong:
            yield AdapterFinding(f"PEFT does not take `{field}`: {brief(raw[field])}", refuses=True, field=field)
    layers = raw.get("layers_to_transform")
    if isinstance(subject.adapter.config.target_modules, str) and layers is not None and "target_modules" in raw:
        yield AdapterFinding(
            "layers_to_transform goes with a list of target_modules, and this is an expression",
            refuses=True,
            field="layers_to_transform",
        )
    elif raw.get("layers_pattern") and not layers and layers != 0:
        yield AdapterFinding(
            "layers_pattern says nothing without layers_to_transform", refuses=True, field="layers_pattern"
        )


TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def _whole_numbers(patterns: object) -> bool:
    return isinstance(patterns, dict) and all(type(value) is int for value in patterns.values())


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@survey(
    "LP110",
    "variant-not-read",
    hint="serve it with PEFT, or merge it first where PEFT can",
)
def variant_not_read(subject: Subject) -> Iterator[AdapterFinding]:
    """The config asks for a variant of LoRA in a field that vLLM never reads.

    What it does: any field that holds a value, that vLLM's `PEFTHelper` does not declare, and that is neither about
    training nor about which modules are meant.

    Why it matters: vLLM 0.32 drops every field that it does not know, and runs the adapter as plain LoRA: for Arrow
    a function of another kind (it routes between several adapters). PEFT 0.21 cannot load an Arrow adapter by itself.

    Example: `"arrow_config": {...}`, `"kasa_config": {...}`.
    """
    fields = [field for field, value in subject.adapter.config.raw.items() if value and _is_unread(field)]
    plain = "vLLM never reads it: it runs the adapter as plain LoRA"
    for field in fields[:MOST_KEYS]:
        yield AdapterFinding(f"`{shown(field)}` has a value, and {plain}", engines=("vllm",), field=field)
    if rest := fields[MOST_KEYS:]:
        plain = "vLLM never reads them: it runs the adapter as plain LoRA"
        yield AdapterFinding(f"{listed(rest)} have values, and {plain}", engines=("vllm",), field=rest[0])
    if "arrow_config" in fields:
        field = "arrow_config"
        yield AdapterFinding("PEFT cannot load an Arrow router by itself", engines=("peft",), refuses=True, field=field)


def _is_unread(field: str) -> bool:
    """Whether vLLM never reads a field that changes what the adapter is. Of a variant that is not known, its name
    decides."""
    if field in BY_FIELD:
        return BY_FIELD[field].vllm_ignores
    return field not in HARMLESS and (field.endswith("_config") or field.startswith("use_"))


HARMLESS = frozenset(("megatron_config", "runtime_config")) | frozenset(
    row.settings for row in INITIALISATIONS if row.settings
)
"""About the training, the initialisation or the machine. What an initialisation does to the base is LP109 and LP406."""
