"""Which library wrote a file of weights, by its content.

In: a file, or the names of its tensors. Out: a `Foreign`: what it is, and a hint; None for the weights of a PEFT LoRA
adapter and for files that cannot be recognised. A pickle is recognised only if torch is installed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_probe.errors import ProbeError
from lora_probe.files import HEAD, opened, shown, wrong_file_type
from lora_probe.files.pickled import open_by_content


@dataclass(frozen=True)
class Foreign:
    """What a file is: `what` continues a sentence that begins with its path."""

    what: str
    hint: str


_IMAGE = "load it with diffusers (`pipeline.load_lora_weights`); PEFT and vLLM's LoRA loader do not read this format"

FORMATS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (
        re.compile(r"lora_(unet|te\d?|transformer|prior)_.+|.+\.lora_(down|up)\.weight"),
        "holds an image model's LoRA in kohya's format",
        _IMAGE,
    ),
    (
        re.compile(
            r"(unet\.)?(down_blocks|mid_block|up_blocks)\..+lora.+|text_encoder(_\d)?\..+lora.+"
            r"|transformer\.(single_)?transformer_blocks\..+lora.+"
        ),
        "holds an image model's LoRA in diffusers' format",
        _IMAGE,
    ),
    (
        re.compile(r".+\.lora_[ab]"),
        "holds an MLX adapter",
        "convert it, or fuse it with mlx_lm.fuse and serve the model; renaming is not enough, because MLX stores "
        "lora_a and lora_b transposed",
    ),
    (
        re.compile(r".+\.(adapters\..+\.adapter_(down|up)\b.*|loras\.[^.]+\.lora_[AB])"),
        "holds an AdapterHub adapter",
        "load it with the adapters library; its weights have other names and shapes than PEFT's",
    ),
    (
        re.compile(r"w_[ab]_\d+"),
        "holds a LoRA of Segment Anything, as SAMed writes it",
        "load it with the code that trained it; PEFT and vLLM do not read this format",
    ),
)
"""The names of tensors, what they show, and a hint."""
LARGEST = 2**30
"""Bytes of a pickle that is opened only to name it."""
_PREFIX_OF_PEFT = "base_model.model."


def foreign_file(path: Path) -> Foreign | None:
    """What a file is that was found where the weights of an adapter are expected."""
    try:
        with opened(path) as (file, size):
            start = file.read(HEAD)
        if wrong := wrong_file_type(start, "the weights of a PEFT adapter"):
            return Foreign(*wrong)
        weights = open_by_content(path) if size < LARGEST or start[8:9] == b"{" else None
    except ProbeError:
        # The caller knows only the file's name then, as it does without this look.
        return None
    return None if weights is None else foreign_tensors(weights.tensors, weights.metadata)


def foreign_tensors(names: Collection[str], metadata: Mapping[str, str] | None = None) -> Foreign | None:
    """What tensors of these names are."""
    for pattern, what, hint in FORMATS:
        if (name := _first(pattern, names)) is not None:
            return Foreign(f"{what} (such as the tensor `{shown(name)}`)", hint)
    if any(key.startswith("ss_") for key in metadata or ()):
        return Foreign("holds an image model's LoRA: its metadata was written by kohya's sd-scripts", _IMAGE)
    if names and not any("lora" in name.lower() or name.startswith(_PREFIX_OF_PEFT) for name in names):
        matrices = [name for name in names if name.endswith(".weight")]
        if matrices:
            count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
            return Foreign(
                f"holds a whole model, or part of one: {count} without LoRA, such as `{shown(matrices[0])}`",
                "serve it without an adapter if it is a merged model; the adapter is the file with lora_A and lora_B",
            )
    return None


def _first(pattern: re.Pattern[str], names: Iterable[str]) -> str | None:
    return next((name for name in names if not name.startswith(_PREFIX_OF_PEFT) and pattern.fullmatch(name)), None)
