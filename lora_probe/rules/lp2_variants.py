"""LP2xx: what the config says was trained against what the file holds. In: a `Subject`. Out: `AdapterFinding`s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_probe.adapter.pattern_index import beginnings
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
    hint="write the flag back into adapter_config.json: it was taken out, or the config is another run's",
)
def tensors_without_flag(subject: Subject) -> Iterator[AdapterFinding]:
    """The file holds tensors of a variant that the config does not ask for.

    What it does: magnitude vectors without `use_dora`, biases of lora_B without `lora_bias`, biases of the base with
    `bias: none`, trained tokens without `trainable_token_indices`, whole modules without `modules_to_save`.

    Why it matters: someone took the flag out to get past an error. PEFT 0.21 drops tensors of a variant and runs plain
    LoRA; what has the name of a parameter of the base (biases, whole modules) it puts in place of the base's. Both
    without a word. vLLM refuses the tensors (LP210).

    Mend: write the flag back, or train without the variant.
    """
    raw = subject.adapter.config.raw
    held = _variants(subject)
    for field, (what, names) in held.items():
        asked = raw.get(field)
        if names and (not asked or asked == "none"):
            over = field in ("bias", "modules_to_save")
            effect = "puts them in place of the base's" if over else "drops them"
            yield AdapterFinding(
                f"the file holds {what} (`{shown(names[0])}`), and `{field}` is {_shown(asked)}: "
                f"PEFT {effect} without a word",
                engines=("peft",),
                path=subject.adapter.weights.path,
            )


@survey(
    "LP212",
    "flag-without-tensors",
    hint="save the adapter again: the tensors that the flag speaks of were trained and are not in the file",
)
def flag_without_tensors(subject: Subject) -> Iterator[AdapterFinding]:
    """The config says that whole modules or tokens were trained, and they are not in the file.

    What it does: the mirror of LP211 for `trainable_token_indices` and `modules_to_save`.

    Why it matters: that part of the training is gone. PEFT 0.21 dies with a KeyError that has no other text.

    Example: tensors deleted so that vLLM takes the file.

    References: vllm-project/vllm#4186, PrimeIntellect-ai/prime-rl#3358.
    """
    raw, held = subject.adapter.config.raw, _variants(subject)
    if raw.get("trainable_token_indices") and not held["trainable_token_indices"][1]:
        yield AdapterFinding(
            "`trainable_token_indices` is set, and the file holds no trained tokens",
            engines=("peft",),
            refuses=True,
            field="trainable_token_indices",
        )
    if unsaved := _unsaved(subject):
        more = f" and {len(unsaved) - 1} more" if len(unsaved) > 1 else ""
        yield AdapterFinding(
            f"modules_to_save names `{shown(unsaved[0])}`{more}, and the file does not hold it",
            engines=("peft",),
            refuses=True,
            field="modules_to_save",
        )


def _unsaved(subject: Subject) -> list[str]:
    """Modules of the base that modules_to_save names and the file lacks: a name that the base does not have is none."""
    view = subject.views.get("peft")
    wanted = set(_list(subject.adapter.config.raw.get("modules_to_save")))
    if view is None or not wanted:
        return []
    # PEFT compares the plain ends of names, so that `norm` means `input_layernorm` as well.
    lengths = {len(end) for end in wanted}
    modules = [
        module
        for module, found in view.modules.items()
        if (found.kind != "other" or "norm" in found.why_not.lower())
        and any(module[len(module) - length :] in wanted for length in lengths if length <= len(module))
    ]
    absent = set(modules)
    for name in subject.adapter.weights.tensors:
        if ".lora_" not in name:
            absent.difference_update(beginnings(name.removeprefix(PREFIX)))
    return [module for module in modules if module in absent]


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _variants(subject: Subject) -> dict[str, tuple[str, list[str]]]:
    """Field of the config -> what it makes PEFT save, and the tensors of the file that are such."""
    found: dict[str, tuple[str, list[str]]] = {field: (extra.plural, []) for field, extra in EXTRAS.items()}
    found |= {
        "bias": ("biases of the base", []),
        "trainable_token_indices": ("trained tokens", []),
        "modules_to_save": ("whole modules", []),
    }
    resized = _resized_embeddings(subject)
    for name in subject.adapter.weights.tensors:
        field = next((field for field, extra in EXTRAS.items() if extra.is_named(name)), None)
        if field is not None:
            found[field][1].append(name)
        elif "trainable_tokens" in name:
            found["trainable_token_indices"][1].append(name)
        elif ".lora_" in name:
            continue
        elif name.endswith(".bias") and not any(f".{head}." in name for head in CLASSIFIER_HEADS):
            found["bias"][1].append(name)
        elif name.endswith(".weight") and name not in resized:
            found["modules_to_save"][1].append(name)
    return found


def _resized_embeddings(subject: Subject) -> set[str]:
    """Embeddings and heads that PEFT saves on its own, as it does after a resize or beside an adapter of theirs."""
    return {
        name
        for name in subject.adapter.weights.tensors
        if name.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2] in EMBEDDINGS
    }


def _shown(value: Any) -> str:
    return "not in the config" if value is None else f"`{brief(value)}`"
