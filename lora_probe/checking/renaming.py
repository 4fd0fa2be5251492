"""`check --fix`: the adapter's tensors under the names that engines look for, in a new folder.

In: an adapter, and the modules of its base if they are known. Out: a `Fix`, which names can be renamed and which
cannot; `write` makes the folder. Values do not change: bytes are copied as stored, and a `.bin` becomes safetensors.
The original folder stays as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Container, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_probe.adapter import WEIGHTS, Adapter
from lora_probe.adapter.folder import inside
from lora_probe.base import Shapes
from lora_probe.errors import ProbeError, UnreadableFile
from lora_probe.files import opened
from lora_probe.files.values import read_chunk
from lora_probe.names import PREFIX
from lora_probe.precision import STORED
from lora_probe.rules.lp3_heads import meant_of_whole
from lora_probe.rules.paths import bare
from lora_probe.rules.stored import expect

_NAMED = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\.(?!weight$|bias$)([^.]+)(\.weight)?$")
_UNENDED = re.compile(r"\.(lora_A|lora_B)$")
_EMBEDDED = re.compile(r"\.(lora_embedding_A|lora_embedding_B)\.weight$")
TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state", "training_args.bin", "scaler.pt", "pytorch_model")
"""Files of a training run that are not part of an adapter and are not copied."""


@dataclass(frozen=True)
class Fix:
    """What `--fix` changes: new names by old names, in the order of the file; `converted` from a pickle to safetensors.

    `left` holds the names that cannot be fixed, and why.
    """

    adapter: Adapter
    renamed: Mapping[str, str]
    left: Mapping[str, str]
    converted: bool

    @property
    def needed(self) -> bool:
        return bool(self.renamed) or self.converted


def find_fix(adapter: Adapter, shapes: Shapes | None) -> Fix:
    """Find the correct name of every tensor of the file.

    Wrappers, doubled and missing prefixes, missing endings, and an adapter's name inside the keys are visible in the
    names alone. The prefix of another class of the model, and words that the base model does not have, can be fixed if
    the base is known (`rules/stored.py`). Tensors that would get the same name are left as they are.
    """
    modules = shapes or {}
    rows = expect(adapter, modules, spectra={pair.key: None for pair in adapter.modules}) if modules else ()
    paths = {
        row.entry.stored_as: row.module
        for row in rows
        if row.entry is not None and row.entry.parameter == "weight" and row.module in modules
    }
    fused = {pair.stored_as for pair in adapter.modules if pair.parameter != "weight"}
    names = {name: _fixed(name, paths, fused, adapter.weights.tensors) for name in adapter.weights.tensors}
    owners: dict[str, list[str]] = {}
    for name, new in names.items():
        owners.setdefault(new, []).append(name)
    renamed, left = {}, {}
    for name, new in names.items():
        if new == name:
            continue
        if len(owners[new]) > 1:
            left[name] = f"{len(owners[new])} tensors would be renamed to `{new}`"
        else:
            renamed[name] = new
    return Fix(adapter, renamed, left, converted=adapter.weights.path.name != WEIGHTS)


def _fixed(name: str, paths: Mapping[str, str], fused: Set[str], tensors: Container[str]) -> str:
    """The name with PEFT's prefix once, with its endings, without wrappers and the adapter's name, and with the base's
    path (`paths`). The paths of `fused` parameters are left as they are."""
    stored = name.removeprefix(PREFIX)
    path = next((stored[: match.start()] for match in re.finditer(r"\.lora_", stored)), "")
    if not path:
        return meant_of_whole(name, tensors)
    plain = stored if path in fused else bare(name)
    plain = _NAMED.sub(lambda match: f".{match[1]}", plain)
    plain = _UNENDED.sub(r".\1.weight", plain)
    plain = _EMBEDDED.sub(r".\1", plain)
    if path in paths:
        plain = paths[path] + plain[plain.index(".lora_") :]
    return PREFIX + plain


def write(fix: Fix, folder: Path) -> list[str]:
    """Write the fixed adapter to the new folder `folder`. Returns the names of files that were not copied.

    Raises:
        ProbeError: the folder exists already, or cannot be created.
    """
    adapter = fix.adapter
    if folder.exists():
        raise ProbeError(f"`{folder}` already exists and is not overwritten", "pass another folder with -o")
    if folder.resolve().is_relative_to(adapter.path.resolve()):
        raise ProbeError(f"`{folder}` is inside the adapter's own folder", "pass a folder outside of it with -o")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ProbeError(f"cannot write `{folder}`: {error.strerror or error}") from error
    try:
        skipped = _copy(adapter, partial)
        _save(fix, partial / WEIGHTS)
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        raise ProbeError(f"cannot write `{folder}`: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return skipped


def _save(fix: Fix, path: Path) -> None:
    """Write the same bytes under the new names as safetensors, in chunks (for the format see `weights.py`)."""
    weights = fix.adapter.weights
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **weights.metadata}}
    end = 0
    for name, tensor in weights.tensors.items():
        start, end = end, end + tensor.parameters * STORED[tensor.dtype].width
        new = fix.renamed.get(name, name)
        header[new] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in weights.tensors.values():
            for begin in range(0, tensor.parameters, CHUNK):
                values = read_chunk(weights, tensor, begin, min(begin + CHUNK, tensor.parameters))
                file.write(np.ascontiguousarray(values).tobytes())


CHUNK = 2**24
"""Values copied at a time."""


def _copy(adapter: Adapter, target: Path) -> list[str]:
    """Copy everything next to the weights except training state, folders, and links out of the adapter's storage.

    Links inside a Hugging Face cache, from a snapshot to its blobs, are followed. Returns the names left out.
    """
    skipped = []
    for entry in sorted(adapter.path.iterdir()):
        if entry.name.startswith("adapter_model"):
            continue
        try:
            if entry.name.startswith(TRAINING) or not entry.is_file():
                raise UnreadableFile(f"`{entry}` is not part of an adapter")
            with opened(inside(adapter.path, entry.name)) as (source, _), (target / entry.name).open("xb") as copy:
                shutil.copyfileobj(source, copy)
        except UnreadableFile:
            skipped.append(entry.name)
    return skipped
