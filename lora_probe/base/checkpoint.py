"""A whole model on disk: all its tensors, sharded or not, read in chunks of rows.

In: a folder with `model.safetensors`, shards of it, or `pytorch_model.bin` (through torch's weights-only loader). Out:
a `Checkpoint`. Files are chosen as transformers does: the single safetensors file, then the index of its shards, then
the same for `.bin`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_probe.base.model import OPTIONS, find_model
from lora_probe.errors import TooLarge, UnreadableFile
from lora_probe.files import opened, shown
from lora_probe.files.json_object import read_json
from lora_probe.files.pickled import load, plain, require_own_values, values_of
from lora_probe.files.values import Bytes, Raw, read_chunk
from lora_probe.files.weights import TensorHeader, WeightsFile, open_weights
from lora_probe.names import layer_of, ranges
from lora_probe.precision import STORED

MAX_INDEX = 100_000_000
"""Bytes of an index; that of a model with hundreds of experts has 10 MB."""
MAX_SHARDS = 10_000
"""Files of one model; the largest known models have a few hundred."""
MOST_NAMED = 5
"""Most files that one message names."""
SAFETENSORS, PICKLES = ("model", ".safetensors"), ("pytorch_model", ".bin")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared")
"""transformers' names for the module of the input embeddings."""

_HEAD = re.compile(r"(?:^|\.)(?:(?:lm_head|embed_out|output|score)\.(?:weight|qweight|weight_packed)|classifier\..+)$")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint. `read(start, stop, into)` returns a chunk of its values as stored in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    read: Callable[[int, int, Bytes | None], Raw]

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as rows and columns: leading axes are merged, a vector is one row."""
        columns = self.shape[-1] if self.shape else 1
        return int(np.prod(self.shape[:-1], dtype=np.int64)), columns

    def rows(self, start: int, stop: int, into: Bytes | None = None) -> Raw:
        """Rows of the matrix as stored: `[stop - start, columns]`; written to `into` if that is large enough."""
        columns = self.matrix[1]
        return self.read(start * columns, stop * columns, into).reshape(stop - start, columns)

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * STORED[self.dtype].width


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model, and its `config.json`."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def tied(self) -> bool:
        """Whether output and input embeddings are one tensor.

        A config may leave it out, and the default depends on the model type (GPT-2 and Gemma: yes, Llama: no). Then
        they are tied if the files hold input embeddings and no output head.
        """
        for settings in (self.config, self._text):
            if "tie_word_embeddings" in settings:
                return bool(settings["tie_word_embeddings"])
        outer = [name for name in self.tensors if layer_of(name) is None]
        embedded = any(name.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS for name in outer)
        return embedded and not any(_HEAD.search(name) for name in outer)

    @property
    def _text(self) -> Mapping[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else {}

    @property
    def quantization_config(self) -> Mapping[str, Any] | None:
        """The config's quantisation settings, for the whole model or for its language model."""
        for settings in (self.config, self._text):
            if isinstance(quantization := settings.get("quantization_config"), dict) and quantization:
                return quantization
        return None

    @property
    def quantisation(self) -> str | None:
        """The quantisation method of the weights, if they are quantised."""
        settings = self.quantization_config
        return None if settings is None else str(settings.get("quant_method", "an unnamed method"))


def open_checkpoint(name: str | Path, *, role: str = "base model") -> Checkpoint:
    """Open the weights of a model by folder, or by id if it is in the local cache. `role`: as in `find_model`.

    Raises:
        UnreadableFile: no model, no weights in it, or a missing or damaged shard, with the layers that it holds.
        TooLarge: more files, longer names, or more tensors of the same bytes than any model has.
    """
    folder = find_model(str(name), role=role)
    files, placed = _files(folder, role)
    expected: dict[str, list[str]] = {}
    for stored, file_name in placed.items():
        expected.setdefault(file_name, []).append(stored)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _tensors(file, expected.get(file.name, ())):
            if tensor.name in tensors:
                raise UnreadableFile(
                    f"`{folder}` holds the tensor `{shown(tensor.name)}` twice: in {tensor.file.name} and another file"
                )
            tensors[tensor.name] = tensor
    absent = [tensor for tensor in placed if tensor not in tensors]
    if absent:
        raise UnreadableFile(
            f"`{folder}`: {placed[absent[0]]} lacks the tensor `{shown(absent[0])}`, which the index places in it"
            + (f", and {len(absent) - 1} more" if len(absent) > 1 else ""),
            "copy or download the whole folder again",
        )
    if not tensors:
        raise UnreadableFile(f"`{folder}` holds no tensors", "save or download the model again")
    return Checkpoint(folder, read_json(folder / "config.json"), tensors)


def _files(folder: Path, role: str) -> tuple[list[Path], dict[str, str]]:
    """The files with the weights, and the file of each tensor according to the index (empty without one)."""
    for stem, suffix in (SAFETENSORS, PICKLES):
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.exists():
            return [whole], {}
        if index.exists():
            placed = _index(index)
            files = [folder / name for name in sorted(set(placed.values()))]
            _require(folder, [file for file in files if not file.exists()], placed)
            return files, placed
        shards = sorted(folder.glob(f"{stem}-*-of-*{suffix}"))
        if shards:
            _require(folder, _absent_shards(shards), {})
            return shards, {}
    if (folder / "adapter_config.json").exists():
        raise UnreadableFile(
            f"`{folder}` is an adapter, not a model", f"pass the folder of the {role} with {OPTIONS[role]}"
        )
    raise UnreadableFile(
        f"`{folder}` holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards",
        "save or download the model again",
    )


def _index(path: Path) -> dict[str, str]:
    placed = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()) or not placed:
        raise UnreadableFile(f"`{path}` has no `weight_map` from tensors to files", "save the model again")
    wrong = {name: _wrong_file(path.parent, name) for name in set(placed.values())}
    for tensor, name in placed.items():
        if why := _wrong_name(tensor) or wrong[name]:
            raise UnreadableFile(
                f"`{path}` places the tensor {_shown(tensor)} in the file {_shown(name)}: {why}",
                "save or download the model again",
            )
    return placed


def _wrong_name(tensor: str) -> str:
    return "" if tensor and tensor.isprintable() else "this is not a valid tensor name"


def _wrong_file(folder: Path, name: str) -> str:
    """Why `name` cannot be a file of an index; empty if it can. Missing files are reported elsewhere, together."""
    if name in ("", ".", "..") or not name.isprintable():
        return "this is not a valid file name"
    if Path(name).name != name:
        return "the file is outside of the folder"
    try:
        return "this is a folder" if (folder / name).is_dir() else ""
    except OSError as error:
        return str(error.strerror or error)


def _shown(name: str) -> str:
    """An untrusted name in quotes: control characters escaped, cut to length."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _absent_shards(shards: Sequence[Path]) -> list[Path]:
    """The missing shards, according to the names of the others (`-of-00005`).

    Raises:
        TooLarge: a name counts more files than any model has.
    """
    counts = {int(match[2]): shard for shard in shards if (match := _SHARD.search(shard.name))}
    names = {shard.name for shard in shards}
    pattern, total = shards[0].name, max(counts, default=0)
    if total > MAX_SHARDS:
        raise TooLarge(
            f"`{counts[total]}` is one of {total:,} files according to its name, more than the limit of {MAX_SHARDS:,}",
            "save or download the model again",
        )
    head, _, tail = pattern.partition(match[0]) if (match := _SHARD.search(pattern)) else (pattern, "", "")
    width = len(match[1]) if match else 0
    wanted = [f"{head}-{n:0{width}d}-of-{total:0{width}d}.{tail}" for n in range(1, total + 1)]
    return [shards[0].with_name(name) for name in wanted if name not in names]


def _require(folder: Path, absent: Sequence[Path], placed: Mapping[str, str]) -> None:
    if not absent:
        return
    names = ", ".join(shown(file.name) for file in absent[:MOST_NAMED])
    more = f" and {len(absent) - MOST_NAMED:,} more files" if len(absent) > MOST_NAMED else ""
    missing = {file.name for file in absent}
    held = [tensor for tensor, name in placed.items() if name in missing]
    raise UnreadableFile(
        f"`{folder}` is incomplete: {names}{more} {'is' if len(absent) == 1 else 'are'} missing{_about(held)}",
        "copy or download the missing files",
    )


def _about(tensors: Sequence[str]) -> str:
    """The contents of a shard, for a message: `, which holds layers 3-5 and model.norm.weight`."""
    if not tensors:
        return ""
    layers = sorted({layer for tensor in tensors if (layer := layer_of(tensor)) is not None})
    loose = [tensor for tensor in tensors if layer_of(tensor) is None]
    parts = [f"{'layer' if len(layers) == 1 else 'layers'} {shown(ranges(layers))}"] if layers else []
    return f", which holds {' and '.join([*parts, *map(shown, loose[:3])])}"


def _tensors(file: Path, expected: Sequence[str]) -> list[StoredTensor]:
    try:
        return _of_pickle(file) if file.suffix == PICKLES[1] else _of_safetensors(file)
    except UnreadableFile as error:
        raise UnreadableFile(error.message + _about(expected), error.hint) from error


def _of_safetensors(file: Path) -> list[StoredTensor]:
    weights = open_weights(file)
    return [of_header(weights, header, header.name) for header in weights.tensors.values()]


def of_header(file: WeightsFile, header: TensorHeader, name: str) -> StoredTensor:
    """A tensor of a weights file under the name `name`."""

    def read(start: int, stop: int, into: Bytes | None) -> Raw:
        return read_chunk(file, header, start, stop, into)

    return StoredTensor(name, header.dtype, header.shape, file.path, read)


def _of_pickle(file: Path) -> list[StoredTensor]:
    loaded = load(file)
    tensors = of_torch(loaded if isinstance(loaded, dict) else {}, file)
    if not tensors:
        raise UnreadableFile(f"`{file}` holds no tensors")
    with opened(file) as (_, size):
        require_own_values(file, [tensor.size for tensor in tensors], size)
    return tensors


def of_torch(state: dict[str, Any], file: Path) -> list[StoredTensor]:
    """The torch tensors of a dictionary, which are read from memory.

    Raises:
        UnreadableFile: one is not a plain array of values: sparse, nested, quantised, or on the meta device.
    """
    return [
        _in_memory(header, tensor, file)
        for header, tensor in plain(state, file, "save the model with plain dense tensors")
    ]


def _in_memory(header: TensorHeader, tensor: Any, file: Path) -> StoredTensor:
    def read(start: int, stop: int, into: Bytes | None) -> Raw:
        return values_of(tensor, header.dtype, start, stop)

    return StoredTensor(header.name, header.dtype, header.shape, file, read)
