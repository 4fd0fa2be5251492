"""LP1xx: the modules that the config targets. In: a `Subject`. Out: findings, and `placed` of one pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_probe.adapter.pattern_index import ends
from lora_probe.rules.paths import listed
from lora_probe.rules.registry import AdapterFinding, rule, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject


@survey(
    "LP105",
    "pattern-without-module",
    severity="warning",
    hint="correct the pattern, or take it out; it is matched against the end of a module's path",
)
def pattern_without_module(subject: Subject) -> Iterator[AdapterFinding]:
    """A key of rank_pattern or alpha_pattern matches no module of the adapter.

    What it does: matches each key against the names in the file, as vLLM does, and the modules that the config
    targets, as PEFT does.

    Why it matters: the rank or alpha that was meant is not used, and the module runs with the general one. PEFT 0.21
    warns when it builds the adapter; vLLM 0.32 says nothing.

    Example: `{"q_porj": 16}`. References: axolotl-ai-cloud/axolotl#3673.
    """
    config = subject.adapter.config
    names = {pair.pattern_name for pair in subject.adapter.modules}
    names |= subject.targeted
    for field, patterns in (("rank_pattern", config.ranks), ("alpha_pattern", config.alphas)):
        idle = patterns.idle(names)
        if idle and names:
            yield AdapterFinding(f"{field} has {listed(idle)}, which matches no module of the adapter", field=field)


@rule(
    "LP106",
    "not-targeted",
    "placed",
    "absent",
    engines=("peft",),
    hint="add the module to target_modules, if it was trained: the tensors are in the file",
    field="target_modules",
)
def not_targeted() -> str:
    """The file holds a pair that the config does not target.

    What it does: resolves target_modules, exclude_modules, layers_to_transform and layers_pattern as PEFT does, and
    holds them against the names in the file.

    Why it matters: the engines run different adapters, and both look healthy. PEFT 0.21 makes layers for the config's
    modules alone and drops the other tensors without a word; vLLM ({vllm}) never looks at the config for
    that and applies every tensor.

    Example: adapter_config.json of another run beside the right weights. References: hiyouga/LlamaFactory#10662.
    """
    return "the config does not target it"


@survey(
    "LP107",
    "nothing-targeted",
    engines=("peft",),
    needs="base",
    hint="correct target_modules: PEFT compares it with the paths of the base's modules",
    field="target_modules",
)
def nothing_targeted(subject: Subject) -> Iterator[AdapterFinding]:
    """The config targets no module of the base at all.

    Why it matters: PEFT 0.21 refuses (`Target modules ... not found in the base model`). vLLM 0.32 decides from the
    tensors and does not look at the field.

    Example: `["query_key_value"]` on a Llama; an expression that is matched against a part of the name, where PEFT
    matches the whole. References: hiyouga/LlamaFactory#10662.
    """
    config = subject.adapter.config
    if subject.targeted or config.raw.get("target_parameters") or not subject.shapes:
        return
    yield AdapterFinding(
        f"target_modules {_named(config.target_modules)} matches none of the {len(subject.shapes)} modules of the base",
        engines=("peft",),
        refuses=True,
    )


@survey(
    "LP108",
    "target-matches-nothing",
    severity="info",
    engines=("peft",),
    needs="base",
    hint="harmless if the name belongs to another kind of model; a typo if it does not",
    field="target_modules",
)
def target_matches_nothing(subject: Subject) -> Iterator[AdapterFinding]:
    """One of several target_modules matches no module of the base.

    Why it matters: PEFT 0.21 takes the others and says nothing, so a typo leaves its modules untrained.

    Example: `["q_proj", "v_proj", "query"]`: lists that are meant for several kinds of models.
    """
    config = subject.adapter.config
    if not isinstance(config.target_modules, tuple) or not subject.shapes or not subject.targeted:
        return
    idle = set(config.target_modules)
    idle -= {name.rpartition(".")[2] for name in config.raw.get("target_parameters") or ()}
    for path in (*subject.shapes, *(pair.module for pair in subject.adapter.modules)):
        idle.difference_update(ends(path))
    if idle:
        names = [name for name in config.target_modules if name in idle]
        yield AdapterFinding(f"target_modules names {listed(names)}, which is no module of the base")


def _named(targets: str | tuple[str, ...] | None) -> str:
    if not targets:
        return "(none)"
    return listed(targets if isinstance(targets, tuple) else (targets,))
