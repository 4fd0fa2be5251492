"""Mending: an adapter's tensors under the names that engines look for, in a folder of its own.

In: an adapter, and the modules of its base where they are known. Out: `Mending`, what would be renamed and what cannot
be; `write` makes the folder. No value is touched: bytes are copied as they lie in the file, and a `.bin` becomes
safetensors. The folder that was read stays as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_probe.adapter import WEIGHTS, Adapter
from lora_probe.adapter.folder import inside
from lora_probe.base import Shapes
from lora_probe.errors import ProbeError, UnreadableFile
from lora_probe.files import opened
from lora_probe.files.weights import read_chunk
from lora_probe.names import PREFIX
from lora_probe.precision import STORED
from lora_probe.rules.paths import unwrapped
from lora_probe.rules.stored import expect

_NAMED = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)\.(?!weight$|bias$)([^.]+)(\.weight)?$")
TRAINING = ("optimizer.pt", "scheduler.pt", "rng_state", "training_args.bin", "scaler.pt", "pytorch_model")
"""Files of a training run that are no part of an adapter: they are not copied."""


@dataclass(frozen=True)
class Mending:
    """What mending does: new names by old ones, in the order of the file; `converted` from a pickle to safetensors.

    `left` holds names that stay as they are, and why.
    """

    adapter: Adapter
    renamed: Mapping[str, str]
    left: Mapping[str, str]
    converted: bool

    @property
    def needed(self) -> bool:
        return bool(self.renamed) or self.converted


def mend(adapter: Adapter, shapes: Shapes | None) -> Mending:
    """Find a name for every tensor of the file.

    Wrappers, doubled and missing prefixes, and an adapter's name inside the keys can be told from the names alone. A
    prefix of another class of the model can be told where the base is known: the module that ends in the same path
    from the layer's number on. Two tensors that would get one name both stay.
    """
    known = shapes or {}
    rows = expect(adapter, known, spectra={pair.key: None for pair in adapter.modules}) if known else ()
    homes = {
        row.entry.stored_as: row.module
        for row in rows
        if row.entry is not None and row.entry.parameter == "weight" and row.module in known
    }
    wanted = {name: _better(name, homes) for name in adapter.weights.tensors}
    owners: dict[str, list[str]] = {}
    for name, new in wanted.items():
        owners.setdefault(new, []).append(name)
    renamed, left = {}, {}
    for name, new in wanted.items():
        if new == name:
            continue
        if len(owners[new]) > 1:
            left[name] = f"{len(owners[new])} tensors of the file would be called `{new}`"
        else:
            renamed[name] = new
    return Mending(adapter, renamed, left, converted=adapter.weights.path.name != WEIGHTS)


def _better(name: str, homes: Mapping[str, str]) -> str:
    """PEFT's prefix once, no wrappers, no name of an adapter, and the path that the base has."""
    bare = unwrapped(name.replace(PREFIX, ""))
    bare = _NAMED.sub(lambda match: f".{match[1]}{'' if match[1].startswith('lora_emb') else '.weight'}", bare)
    stored = name.removeprefix(PREFIX)
    path = next((stored[: match.start()] for match in re.finditer(r"\.lora_", stored)), "")
    if path in homes:
        tail = bare[bare.index(".lora_") :]
        bare = homes[path] + tail
    return PREFIX + bare


def write(mending: Mending, folder: Path) -> list[str]:
    """Make `folder` with the mended adapter in it. Returns the names of files that were not copied.

    Raises:
        ProbeError: the folder is there, or cannot be made.
    """
    adapter = mending.adapter
    if folder.exists():
        raise ProbeError(f"`{folder}` exists; nothing is overwritten", "give another folder with -o")
    if folder.resolve().is_relative_to(adapter.path.resolve()):
        raise ProbeError(f"`{folder}` lies in the adapter's own folder", "give a folder outside of it with -o")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ProbeError(f"cannot write `{folder}`: {error.strerror or error}") from error
    try:
        skipped = _copy(adapter, partial)
        _save(mending, partial / WEIGHTS)
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        raise ProbeError(f"cannot write `{folder}`: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return skipped


def _save(mending: Mending, path: Path) -> None:
    """A safetensors file of the same bytes under other names, a chunk at a time (the format: see `weights.py`)."""
    weights = mending.adapter.weights
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **weights.metadata}}
    end = 0
    for name, tensor in weights.tensors.items():
        start, end = end, end + tensor.parameters * STORED[tensor.dtype].width
        new = mending.renamed.get(name, name)
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
"""Values that are copied at once."""


def _copy(adapter: Adapter, target: Path) -> list[str]:
    """Everything beside the weights but the state of a training run, folders, and links out of the adapter's storage.

    The files of a hub's cache are links within it: those are followed.
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
