"""LP2xx: what the config lists as trained, and what the file holds. In: a `Subject`. Out: `AdapterFinding`s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_probe.adapter.pattern_index import beginnings
from lora_probe.adapter.saved import saved_names, saves_module, saves_tensor
from lora_probe.adapter.variants import EXTRAS
from lora_probe.base.engine_view import CLASSIFIER_HEADS
from lora_probe.files import brief, shown
from lora_probe.names import PREFIX
from lora_probe.rules.lp2_files import EMBEDDINGS
from lora_probe.rules.registry import AdapterFinding, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject


@survey(
    "LP211",
    "tensors-without-flag",
    hint="restore the flag in adapter_config.json: it was removed, or the config is from another run",
    explains=("LP210",),
)
def tensors_without_flag(subject: Subject) -> Iterator[AdapterFinding]:
    """The file holds tensors of a variant that the config does not enable.

    What it does: looks for magnitude vectors without `use_dora`, biases of lora_B without `lora_bias`, biases of the
    base model with `bias: none`, trained tokens without `trainable_token_indices`, whole modules without
    `modules_to_save`. PEFT adds the heads of some tasks to `modules_to_save` by itself (`classifier` and `score` for
    SEQ_CLS and TOKEN_CLS, `qa_outputs` for QUESTION_ANS); these need no flag.

    Why it matters: the flag was probably removed to get past an error. PEFT 0.21 silently drops a variant's tensors
    and runs plain LoRA; a tensor that is named like a parameter of the base model (biases, whole modules) silently
    replaces that parameter. vLLM refuses the tensors (LP210).

    Fix: restore the flag, or train without the variant.
    """
    raw = subject.adapter.config.raw
    held = _variants(subject)
    for field, (what, names) in held.items():
        setting = raw.get(field)
        if names and (not setting or setting == "none"):
            over = field in ("bias", "modules_to_save")
            effect = "silently puts them in place of the base model's" if over else "silently drops them"
            yield AdapterFinding(
                f"the file holds {what} (`{shown(names[0])}`), but `{field}` is {_shown(setting)}: PEFT {effect}",
                engines=("peft",),
                path=subject.adapter.weights.path,
                hint=LEFT_OVER if ".base_layer." in names[0] else "",
            )


LEFT_OVER = "remove the tensors of the base model (`.base_layer.`) from the file: the base has them already"


@survey(
    "LP212",
    "flag-without-tensors",
    hint="save the adapter again: the file lacks the tensors that the flag requires",
    follows=("LP321", "LP322"),
    explains=("LP406",),
)
def flag_without_tensors(subject: Subject) -> Iterator[AdapterFinding]:
    """The config lists whole modules or tokens as trained, but they are not in the file.

    What it does: the reverse of LP211, for `trainable_token_indices` and `modules_to_save`.

    Why it matters: that part of the training is missing. PEFT 0.21 fails with a KeyError that has no explanation.

    Example: tensors deleted to make vLLM accept the file.

    References: vllm-project/vllm#4186, PrimeIntellect-ai/prime-rl#3358.
    """
    raw, held = subject.adapter.config.raw, _variants(subject)
    if raw.get("trainable_token_indices") and not held["trainable_token_indices"][1]:
        yield AdapterFinding(
            "`trainable_token_indices` is set, but the file has no trained tokens",
            engines=("peft",),
            refuses=True,
            field="trainable_token_indices",
        )
    if unsaved := _unsaved(subject):
        more = f" and {len(unsaved) - 1} more" if len(unsaved) > 1 else ""
        yield AdapterFinding(
            f"modules_to_save lists modules that are not in the file: `{shown(unsaved[0])}`{more}",
            engines=("peft",),
            refuses=True,
            field="modules_to_save",
        )


def _unsaved(subject: Subject) -> list[str]:
    """Modules of the base model that PEFT saves as a whole and the file lacks. Unknown names do not count."""
    view, names = subject.views.get("peft"), saved_names(subject.adapter.config.raw)
    if view is None or not names:
        return []
    whole = {module for module in view.modules if saves_module(names, module)}
    modules = [
        module
        for module, described in view.modules.items()
        if (described.kind != "other" or "norm" in described.why_not.lower())
        and (module in whole or not whole.isdisjoint(beginnings(module)))
    ]
    held = {name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in subject.adapter.weights.tensors}
    return [module for module in modules if f"{module}.weight" not in held]


def _variants(subject: Subject) -> dict[str, tuple[str, list[str]]]:
    """Field of the config -> what it makes PEFT save, and the tensors of that type in the file."""
    saved: dict[str, tuple[str, list[str]]] = {field: (extra.plural, []) for field, extra in EXTRAS.items()}
    saved |= {
        "bias": ("biases of the base model", []),
        "trainable_token_indices": ("trained tokens", []),
        "modules_to_save": ("whole modules", []),
    }
    resized = _resized_embeddings(subject)
    names = saved_names(subject.adapter.config.raw)
    for name in subject.adapter.weights.tensors:
        field = next((field for field, extra in EXTRAS.items() if extra.is_named(name)), None)
        if field is not None:
            saved[field][1].append(name)
        elif "trainable_tokens" in name:
            saved["trainable_token_indices"][1].append(name)
        elif ".lora_" in name or saves_tensor(names, name.removeprefix(PREFIX)):
            continue
        elif name.endswith(".bias") and not any(f".{head}." in name for head in CLASSIFIER_HEADS):
            saved["bias"][1].append(name)
        elif name.endswith(".weight") and name not in resized:
            saved["modules_to_save"][1].append(name)
    return saved


def _resized_embeddings(subject: Subject) -> set[str]:
    """Embeddings and heads that PEFT saves unasked, as after a resize or together with an adapter on them."""
    return {
        name
        for name in subject.adapter.weights.tensors
        if name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2] in EMBEDDINGS
    }


def _shown(value: Any) -> str:
    return "not in the config" if value is None else f"`{brief(value)}`"
