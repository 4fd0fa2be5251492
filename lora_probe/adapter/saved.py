"""The modules that PEFT trains and saves as a whole.

In: `adapter_config.json`. Out: their names, and whether a tensor or a module is of one of them. PEFT compares the plain
ends of paths, so `classifier` means `pre_classifier` as well (`_set_trainable` in `peft/utils/other.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_probe.adapter.pattern_index import beginnings

HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT's models for a task add to modules_to_save when they are created, whatever the config states: the same in
PEFT 0.12 to 0.21. Adapters of older versions have null in the config."""


def saved_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The names in modules_to_save, and those that PEFT adds for the task."""
    return tuple(dict.fromkeys((*_listed(raw), *HEADS_OF_TASKS.get(str(raw.get("task_type")), ()))))


def names_without_pairs(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of modules that PEFT does not adapt although target_modules matches them. For SEQ_CLS alone, PEFT adds
    the names of the task before it creates the layers."""
    return saved_names(raw) if raw.get("task_type") == "SEQ_CLS" else _listed(raw)


def _listed(raw: Mapping[str, Any]) -> tuple[str, ...]:
    listed = raw.get("modules_to_save") or ()
    return (listed,) if isinstance(listed, str) else tuple(listed)


def saves_module(names: tuple[str, ...], module: str) -> bool:
    """Whether PEFT saves the module with this path as a whole."""
    return module.endswith(names)


def saves_tensor(names: tuple[str, ...], path: str) -> bool:
    """Whether a tensor is of such a module, by its path without PEFT's prefix."""
    return bool(names) and any(saves_module(names, module) for module in beginnings(path) if module != path)
