"""LP1xx: what adapter_config.json shows. In: a `Subject`, or the error of reading it. Out: refusals and findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_probe.adapter.blocks import FIELD as BDLORA
from lora_probe.adapter.variants import BY_FIELD, EXTRAS, INITIALISATIONS, initialisation
from lora_probe.files import brief, shown
from lora_probe.names import projection_of
from lora_probe.rules.paths import listed
from lora_probe.rules.registry import AdapterFinding, Family, rule, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

FAMILY = Family("LP1", "adapter_config.json", commands="check", loading_step=0)

REQUIRED = ("r", "lora_alpha", "target_modules")
"""vLLM's `PEFTHelper.from_dict` requires these; PEFT has defaults."""
CONVERT = "convert it before the training run ends: save_pretrained(path_initial_model_for_weight_conversion=...)"
ONLY_TRAINED = "only training uses the {}: remove the tensors named `{}` from the file"
MOST_KEYS = 10
"""Keys of a config that a rule reports one by one; one more finding covers the rest."""


@rule(
    "LP101",
    "config-unreadable",
    "adapter",
    "absent",
    hint="save the adapter again: PEFT's save_pretrained writes both files",
)
def config_unreadable(message: str) -> str:
    """adapter_config.json is missing, is not valid JSON, or has a field of the wrong type.

    What it does: reads the file as PEFT and vLLM do, within size limits, and checks the type of every field that
    decides which modules are adapted and with which scaling.

    Why it matters: nothing can be loaded. vLLM 0.32 reports a missing config as `No adapter found`, which looks like a
    wrong path; PEFT 0.21 treats the path as the name of a repository.

    Example: a Git LFS pointer or an HTML page in place of the JSON; `"r": "8"`.

    Fix: save or download the adapter again.

    References: unslothai/unsloth#1191.
    """
    return message


@rule(
    "LP102",
    "not-a-lora-adapter",
    "adapter",
    "absent",
    hint="convert it with the library that wrote it, or pass the path of the PEFT adapter",
)
def not_lora(message: str) -> str:
    """The folder holds something other than a PEFT LoRA adapter: another method, or another library's format.

    What it does: recognises what other tools store under this file name: MLX, AdapterHub, prefix tuning and other PEFT
    methods, the config of a whole model, keys of an unknown tool. Next to a PEFT config, it recognises weights in the
    formats of kohya, diffusers, MLX, AdapterHub and SAMed, and those of a whole model, by the names of the tensors.

    Why it matters: vLLM 0.32 reads three keys (r, lora_alpha, target_modules) and never `peft_type`. If the config of
    another method has these keys, vLLM loads it as LoRA. Weights of another library are refused by vLLM because of
    their names; PEFT 0.21 warns of missing keys and serves the base model.

    Fix: convert the adapter to PEFT's format.
    """
    return message


@survey(
    "LP103",
    "field-missing",
    hint="add the value that the adapter was trained with; look in the training script or its log",
    explains=("LP106",),
)
def field_missing(subject: Subject) -> Iterator[AdapterFinding]:
    """The config lacks a field that an engine requires.

    What it does: checks for `r`, `lora_alpha` and `target_modules`, which vLLM requires, and for `peft_type`, which
    PEFT requires.

    Why it matters: vLLM 0.32 refuses the adapter (`Missing required configuration fields`). PEFT 0.21 silently uses
    its defaults (r 8, lora_alpha 8, and for target_modules a table by model type). If the adapter was trained with
    other values, its scaling and its modules are wrong. Without `peft_type` PEFT fails with a KeyError, while vLLM
    loads the adapter.

    Example: a converter that does not write `lora_alpha`.

    Fix: write the trained value into adapter_config.json.

    References: NVIDIA/TensorRT-LLM#1477, Blaizzy/mlx-vlm#845.
    """
    config = subject.adapter.config
    missing = [name for name in REQUIRED if name not in config.raw]
    if missing:
        names = ", ".join(f"`{name}`" for name in missing)
        assumed = f"PEFT assumes r {config.rank} and lora_alpha {config.alpha:g}"
        held = listed(sorted({projection_of(pair.module) for pair in subject.adapter.modules}), MOST_KEYS)
        hint = f"write the modules of the file into target_modules: {held}" if missing == ["target_modules"] else ""
        yield AdapterFinding(
            f"the config has no {names} ({assumed})", engines=("vllm",), refuses=True, field=missing[-1], hint=hint
        )
    if "peft_type" not in config.raw:
        message, hint = "the config has no `peft_type`", 'add `"peft_type": "LORA"`'
        yield AdapterFinding(message, engines=("peft",), refuses=True, path=config.path, hint=hint)


@survey(
    "LP104",
    "key-twice",
    severity="warning",
    hint="delete the wrong one: engines use the last",
)
def key_twice(subject: Subject) -> Iterator[AdapterFinding]:
    """A key appears more than once in adapter_config.json.

    Why it matters: Python's JSON reader, which PEFT and vLLM use, silently uses the last value; another reader may use
    the first.

    Fix: delete one of them.
    """
    config = subject.adapter.config
    for key in config.repeated[:MOST_KEYS]:
        yield AdapterFinding(
            f"`{shown(key)}` appears more than once; the value {brief(config.raw.get(key))} is used", field=key
        )
    if rest := config.repeated[MOST_KEYS:]:
        yield AdapterFinding(f"{listed(rest)} appear more than once; the last value of each is used", field=rest[0])


@survey(
    "LP109",
    "init-lost-on-load",
    hint=CONVERT,
    field="init_lora_weights",
    explains=("LP406",),
)
def init_lost(subject: Subject) -> Iterator[AdapterFinding]:
    """The initialisation changed the base model in a way that no engine can reproduce.

    What it does: looks for `lora_ga` and `pissa_niter_N` in init_lora_weights.

    Why it matters: the adapter was trained on a base model from which its own initial part had been subtracted.
    LoRA-GA subtracts it only during training: PEFT 0.21 and vLLM 0.32 silently load the adapter on the unchanged base
    model (measured: log-probabilities off by 1.03, from a model that had been equal to the base model).
    `pissa_niter_N` computes the part with a random method: PEFT uses a different base model at every load (off by
    0.05, twice the trained signal), vLLM 0.32 refuses the adapter.

    Fix: save it with `path_initial_model_for_weight_conversion`, which converts it to a plain LoRA adapter.

    References: huggingface/peft#1929.
    """
    init = subject.adapter.config.raw.get("init_lora_weights")
    row = initialisation(init)
    if row is None:
        return
    if row.base == "in training":
        yield AdapterFinding(
            f"init_lora_weights is `{shown(str(init))}`: what it subtracted from the base model is lost"
        )
    elif row.base == "random":
        yield AdapterFinding(
            f"init_lora_weights is `{shown(str(init))}`: PEFT computes a different base model at every load",
            engines=("peft",),
        )


@survey(
    "LP111",
    "unknown-init",
    engines=("peft",),
    hint="set it to `true` if the initialisation left the base model's weights as they were: for a trained adapter it "
    "has no other effect",
    field="init_lora_weights",
    explains=("LP406",),
)
def unknown_init(subject: Subject) -> Iterator[AdapterFinding]:
    """init_lora_weights has a value that PEFT does not support.

    Why it matters: PEFT 0.21 refuses the adapter (`Unknown initialization`), although the value has no effect on a
    trained adapter; vLLM 0.32 refuses every value that it does not support (LP406).

    Example: `"gausian"`; `"PiSSA"`, which PEFT accepts only in lower case; a value that only a newer PEFT supports.
    """
    init = subject.adapter.config.raw.get("init_lora_weights")
    if not init or init is True:
        return
    if isinstance(init, str) and any(row.accepts(init) for row in INITIALISATIONS):
        return
    row, hint = initialisation(init), ""
    if row is not None and row.loads:
        hint = "write `pissa_niter_` and the number of iterations" if row.spelling else f"write `{row.name}`"
    elif row is not None:
        hint = f"{CONVERT}: PEFT loads it only together with data from the training"
    yield AdapterFinding(f"PEFT does not support init_lora_weights {brief(init)}", refuses=True, hint=hint)


@survey(
    "LP112",
    "value-that-peft-refuses",
    engines=("peft",),
    hint="write a value that PEFT accepts; vLLM does not read most of these fields",
    explains=("LP212", "LP406"),
)
def refused_value(subject: Subject) -> Iterator[AdapterFinding]:
    """A field of the config has a value with which PEFT cannot load the adapter.

    What it does: repeats the checks of `LoraConfig` and of layer creation in PEFT 0.21: the task, the bias, the
    dropout, a rank that is a float, modules_to_save that is a text, layers_to_transform together with a regular
    expression, layers_pattern without layers_to_transform, patterns that are null, lists of BD-LoRA that name a module
    twice or not at all.

    Why it matters: PEFT refuses the adapter. vLLM loads it, because it does not read these fields.

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
        ("modules_to_save", isinstance(raw.get("modules_to_save"), str)),
    ):
        if wrong:
            message = f"PEFT does not accept `{field}`: {brief(raw[field])}"
            yield AdapterFinding(message, refuses=True, field=field, hint=_accepted(field, raw[field], subject))
    yield from _refused_words(subject)
    layers = raw.get("layers_to_transform")
    if isinstance(subject.adapter.config.target_modules, str) and layers is not None and "target_modules" in raw:
        yield AdapterFinding(
            "layers_to_transform requires a list of target_modules, not a regular expression",
            refuses=True,
            field="layers_to_transform",
            hint="remove layers_to_transform, or write target_modules as a list of names",
        )
    elif raw.get("layers_pattern") and not layers and layers != 0:
        message, hint = "layers_pattern requires layers_to_transform", "remove layers_pattern"
        yield AdapterFinding(message, refuses=True, field="layers_pattern", hint=hint)


def _refused_words(subject: Subject) -> Iterator[AdapterFinding]:
    """The first module for which PEFT refuses BD-LoRA."""
    config = subject.adapter.config
    embedding = next((pair for pair in subject.adapter.modules if pair.embedding), None)
    if config.blocks.count > 1 and embedding is not None:
        message = f"PEFT has no BD-LoRA for an embedding, `{shown(embedding.module)}`"
        yield AdapterFinding(message, refuses=True, field=BDLORA, hint="train it without the embedding")
        return
    names = config.targeted(subject.shapes) if subject.shapes else [pair.module for pair in subject.adapter.modules]
    for name in names:
        if (why := config.blocks.refused(name)) is not None:
            message = f"PEFT does not accept `{BDLORA}`: `{shown(name)}` contains {why}"
            hint = f"correct the lists of `{BDLORA}`: write every adapted projection into one of them"
            yield AdapterFinding(message, refuses=True, field=BDLORA, hint=hint)
            return


def _accepted(field: str, value: object, subject: Subject) -> str:
    """What to write into a field instead of a value that PEFT does not accept."""
    if field == "task_type":
        near = value.upper() if isinstance(value, str) else ""
        return f"write `{near}`" if near in TASKS else f"write null, or one of {listed(TASKS, len(TASKS))}"
    if field == "bias":
        held = any(name.endswith(".bias") for name in subject.adapter.weights.tensors)
        return 'write "all" or "lora_only": the file has biases' if held else 'write "none": the file has no biases'
    return {
        "r": f"write it as a whole number: {subject.adapter.config.rank}",
        "rank_pattern": "write an object of patterns and whole numbers, or {} if no module has a rank of its own",
        "alpha_pattern": "write an object of patterns and numbers, or {} if no module has an alpha of its own",
        "lora_dropout": "write a number from 0 to 1; it has no effect on a trained adapter",
        "trainable_token_indices": "write null",
        "modules_to_save": f"write a list of names: [{brief(value)}]",
    }[field]


TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def _whole_numbers(patterns: object) -> bool:
    return isinstance(patterns, dict) and all(type(value) is int for value in patterns.values())


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@survey(
    "LP110",
    "variant-not-read",
    hint="serve it with PEFT, or merge it first if PEFT can merge it",
    explains=("LP210",),
)
def variant_not_read(subject: Subject) -> Iterator[AdapterFinding]:
    """The config enables a LoRA variant through a field that vLLM never reads.

    What it does: reports every field that is set, that vLLM's `PEFTHelper` does not declare, and that concerns neither
    training nor the choice of modules. VeLoRA and MonteCLoRA change only the training: they are reported if the file
    holds the tensors that they need there.

    Why it matters: vLLM 0.32 drops every field that it does not declare. It refuses the file if the variant has tensors
    of its own there (LP210), and otherwise runs the adapter as plain LoRA. For Arrow,
    which routes between several adapters, that is a different function. PEFT 0.21 cannot load an Arrow adapter on its
    own.

    Example: `"arrow_config": {...}`, `"kasa_config": {...}`.
    """
    fields = [field for field, value in subject.adapter.config.raw.items() if value and _is_unread(field)]
    for field in fields[:MOST_KEYS]:
        message = f"`{shown(field)}` is set, but vLLM never reads it"
        if field in EXTRAS and any(map(EXTRAS[field].is_named, subject.adapter.weights.tensors)):
            refused, extra = f"{message} and refuses its tensors", EXTRAS[field]
            hint = ONLY_TRAINED.format(extra.plural, extra.name) if extra.in_training else ""
            yield AdapterFinding(refused, engines=("vllm",), refuses=True, field=field, hint=hint)
            continue
        if field in EXTRAS and EXTRAS[field].in_training:
            continue
        message += " and runs the adapter as plain LoRA"
        if field == "arrow_config":
            message += ", and PEFT cannot load an Arrow router on its own"
            yield AdapterFinding(message, refused_by=("peft",), field=field, hint=ARROW)
        else:
            yield AdapterFinding(message, engines=("vllm",), field=field)
    if rest := fields[MOST_KEYS:]:
        message = f"{listed(rest)} are set, but vLLM never reads them and runs the adapter as plain LoRA"
        yield AdapterFinding(message, engines=("vllm",), field=rest[0])


ARROW = "create the Arrow model with PEFT's `create_arrow_model`, which loads the adapters that the router needs"


def _is_unread(field: str) -> bool:
    """Whether vLLM never reads a field that changes what the adapter computes. For an unknown variant the field's name
    decides."""
    if field in BY_FIELD:
        return BY_FIELD[field].vllm_ignores
    return field not in HARMLESS and (field.endswith("_config") or field.startswith("use_"))


HARMLESS = frozenset(("megatron_config", "runtime_config")) | frozenset(
    row.settings for row in INITIALISATIONS if row.settings
)
"""About the training, the initialisation or the machine. LP109 and LP406 report what changes the base model."""
