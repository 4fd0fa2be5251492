"""LP1xx: the modules that the config targets. In: a `Subject`. Out: findings, and `placed` of one pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_probe.adapter.pattern_index import ends
from lora_probe.adapter.saved import HEADS_OF_TASKS, saved_names
from lora_probe.names import projection_of
from lora_probe.rules.paths import listed
from lora_probe.rules.registry import AdapterFinding, Sentence, rule, survey

if TYPE_CHECKING:
    from lora_probe.adapter import AdapterConfig
    from lora_probe.rules.subject import Subject


@survey(
    "LP105",
    "pattern-without-module",
    severity="warning",
    hint="correct or remove the pattern; it is compared with the end of a module's path",
)
def pattern_without_module(subject: Subject) -> Iterator[AdapterFinding]:
    """A key of rank_pattern or alpha_pattern does not match any module of the adapter.

    What it does: compares each key with the names in the file, as vLLM does, and with the modules that the config
    targets, as PEFT does.

    Why it matters: the intended rank or alpha is not used; the module runs with the adapter's general rank and alpha.
    PEFT 0.21 warns when it builds the adapter; vLLM 0.32 does not.

    Example: `{"q_porj": 16}`.

    References: axolotl-ai-cloud/axolotl#3673.
    """
    config = subject.adapter.config
    names = {pair.pattern_name for pair in subject.adapter.modules}
    names |= subject.targeted
    for field, patterns in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        idle = patterns.idle(names)
        if idle and names:
            yield AdapterFinding(f"no module of the adapter matches {listed(idle)} in {field}", field=field)


@rule(
    "LP106",
    "not-targeted",
    "placed",
    "absent",
    engines=("peft",),
    hint="restore the adapter_config.json that was saved with these weights, or correct the field",
    field="target_modules",
)
def not_targeted(config: AdapterConfig, module: str) -> Sentence:
    """The file holds a pair that the config does not target.

    What it does: resolves target_modules, exclude_modules, layers_to_transform, layers_pattern and modules_to_save as
    PEFT does, and compares the result with the names in the file. The finding points at the field that leaves the
    module out.

    Why it matters: the engines run different adapters, and neither reports a problem. PEFT 0.21 creates layers only
    for the config's modules and silently drops the other tensors; vLLM ({vllm}) does not read these fields and applies
    every tensor.

    Example: the right weights with the adapter_config.json of another run.

    References: hiyouga/LlamaFactory#10662.
    """
    field = config.targets.left_out_by(module)
    why, cure = LEFT_OUT[field]
    if field == "target_modules" and isinstance(config.target_modules, str):
        cure = "change target_modules so that it matches these modules"
    return Sentence(why, field, f"{RESTORE}, or {cure}")


RESTORE = "restore the adapter_config.json that was saved with these weights"
LEFT_OUT = {
    "target_modules": (
        "target_modules does not match it",
        "add the modules to target_modules, by name or by path",
    ),
    "exclude_modules": (
        "exclude_modules excludes it",
        "change exclude_modules so that it does not match these modules",
    ),
    "modules_to_save": (
        "modules_to_save matches it, so PEFT trains the whole module instead of a pair",
        "remove the modules from modules_to_save",
    ),
    "layers_to_transform": (
        "layers_to_transform does not list its layer",
        "add their layers to layers_to_transform (outside of layers: add the whole paths to target_modules)",
    ),
    "layers_pattern": (
        "layers_pattern does not match its path",
        "remove layers_pattern: without it, PEFT finds the layer numbers itself",
    ),
}
"""For each field that may leave a module out: why the module is not targeted, and what to change."""
MOST_NAMES = 10
"""Names of modules that a hint lists."""
OTHERS = frozenset(LEFT_OUT) - {"target_modules"}


@survey(
    "LP107",
    "nothing-targeted",
    engines=("peft",),
    needs="base",
    hint="correct target_modules: PEFT compares it with the paths of the base model's modules",
    field="target_modules",
    follows=("LP301",),
)
def nothing_targeted(subject: Subject) -> Iterator[AdapterFinding]:
    """The config does not target any module of the base model.

    What it does: if target_modules matches modules and another field leaves all of them out, points at that field.

    Why it matters: PEFT 0.21 refuses the adapter (`Target modules ... not found in the base model`). vLLM 0.32 decides
    by the tensors and does not use the field.

    Example: `["query_key_value"]` on a Llama; a regular expression that matches only part of a name, while PEFT
    requires a match of the whole name.

    References: hiyouga/LlamaFactory#10662.
    """
    config = subject.adapter.config
    if subject.targeted or config.raw.get("target_parameters") or not subject.shapes:
        return
    others = {field: None for name in subject.shapes if (field := config.targets.left_out_by(name)) in OTHERS}
    if others:
        field, *_ = others
        message = f"{field} leaves out every module that target_modules matches"
        hint, keys = f"{RESTORE}, or {LEFT_OUT[field][1]}", tuple(pair.key for pair in subject.adapter.modules)
        yield AdapterFinding(message, keys, refuses=True, field=field, hint=hint)
        return
    targets, modules = _named(config.target_modules), len(subject.shapes)
    held = sorted({projection_of(pair.module) for pair in subject.adapter.modules if pair.module in subject.shapes})
    hint = (
        f"{RESTORE}, or write the modules of the file into target_modules: {listed(held, MOST_NAMES)}" if held else ""
    )
    message = f"target_modules {targets} matches none of the base model's {modules} modules"
    yield AdapterFinding(message, refuses=True, hint=hint)


@survey(
    "LP108",
    "target-matches-nothing",
    severity="info",
    engines=("peft",),
    needs="base",
    hint="ignore this if the name is for another model type; otherwise correct the typo",
    field="target_modules",
    follows=("LP301",),
)
def target_matches_nothing(subject: Subject) -> Iterator[AdapterFinding]:
    """One of several target_modules, or one of modules_to_save, does not match any module of the base model.

    Why it matters: PEFT 0.21 uses the others and does not warn, so the modules behind a misspelled name stay
    untrained, or keep their random weights.

    Example: `["q_proj", "v_proj", "query"]`: a list for several model types.
    """
    config = subject.adapter.config
    if (view := subject.views.get("peft")) is not None:
        # PEFT itself writes the heads of a task, which no model has all of.
        known = HEADS_OF_TASKS.get(str(config.raw.get("task_type")), ())
        saved = [name for name in saved_names(config.raw) if name not in known]
        unknown = [name for name in saved if not any(module.endswith(name) for module in view.modules)]
        if unknown:
            message = f"the base model has no module that matches {listed(unknown)} in modules_to_save"
            yield AdapterFinding(message, field="modules_to_save")
    if not isinstance(config.target_modules, tuple) or not subject.shapes or not subject.targeted:
        return
    idle = set(config.target_modules)
    idle -= {name.rpartition(".")[2] for name in config.raw.get("target_parameters") or ()}
    for path in (*subject.shapes, *(pair.module for pair in subject.adapter.modules)):
        idle.difference_update(ends(path))
    if idle:
        names = [name for name in config.target_modules if name in idle]
        yield AdapterFinding(f"the base model has no module that matches {listed(names)} in target_modules")


def _named(targets: str | tuple[str, ...] | None) -> str:
    if not targets:
        return "(none)"
    return listed(targets if isinstance(targets, tuple) else (targets,))
