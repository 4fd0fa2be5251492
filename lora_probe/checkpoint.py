"""A whole model on disk: every tensor of it, sharded or not, read in stretches of rows.

In: a folder with `model.safetensors`, shards of it, or `pytorch_model.bin` (through torch's weights-only loader). Out:
a `Checkpoint`. Which files count is decided as transformers decides it: the single safetensors file, then the index of
its shards, then the same for `.bin`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.adapter import layer_of, ranges
from lora_probe.base import find_model
from lora_probe.config import read_json
from lora_probe.errors import UnreadableFile
from lora_probe.weights import DTYPES, Bytes, TensorHeader, open_weights, read_bytes

Raw = npt.NDArray[Any]
SAFETENSORS, PICKLES = ("model", ".safetensors"), ("pytorch_model", ".bin")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint. `read(start, stop, into)` gives values of that stretch as they lie in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    read: Callable[[int, int, Bytes | None], Raw]

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape as rows and columns: leading axes are joined, a vector is one row."""
        columns = self.shape[-1] if self.shape else 1
        return int(np.prod(self.shape[:-1], dtype=np.int64)), columns

    def rows(self, start: int, stop: int, into: Bytes | None = None) -> Raw:
        """Rows of the matrix as they lie in the file: `[stop - start, columns]`; in `into` if that is large enough."""
        columns = self.matrix[1]
        return self.read(start * columns, stop * columns, into).reshape(stop - start, columns)

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype][1]


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
        """Whether the config says that output and input embeddings are one. Transformers' default is False."""
        return bool(self.config.get("tie_word_embeddings", self._text.get("tie_word_embeddings", False)))

    @property
    def _text(self) -> Mapping[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else {}

    @property
    def quantisation(self) -> str | None:
        """How the weights are quantised, if they are."""
        found = self.config.get("quantization_config") or self._text.get("quantization_config")
        return str(found.get("quant_method", "an unnamed method")) if isinstance(found, dict) else None


def open_checkpoint(name: str | Path) -> Checkpoint:
    """Open the weights of a model by folder, or by id where the local cache holds it.

    Raises:
        UnreadableFile: no model, no weights in it, a shard that is missing or damaged, with the layers it holds.
    """
    folder = find_model(str(name))
    files, placed = _files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        expected = [tensor for tensor, home in placed.items() if home == file.name]
        for tensor in _tensors(file, expected):
            if tensor.name in tensors:
                raise UnreadableFile(
                    f"`{folder}` holds the tensor `{tensor.name}` twice: {tensor.file.name} and another"
                )
            tensors[tensor.name] = tensor
    absent = [tensor for tensor in placed if tensor not in tensors]
    if absent:
        raise UnreadableFile(
            f"`{folder}`: {placed[absent[0]]} lacks the tensor `{absent[0]}` that the index places in it"
            + (f", and {len(absent) - 1} more" if len(absent) > 1 else ""),
            "copy or download the whole folder again",
        )
    return Checkpoint(folder, read_json(folder / "config.json"), tensors)


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that hold the weights, and where the index says that each tensor is (empty without one)."""
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
            f"`{folder}` is an adapter, not a model", "give the folder that the merged model was saved to"
        )
    raise UnreadableFile(
        f"`{folder}` holds no weights: neither model.safetensors nor pytorch_model.bin, whole or in shards",
        "was the download or the save cut short?",
    )


def _index(path: Path) -> dict[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()) or not placed:
        raise UnreadableFile(f"`{path}` has no `weight_map` from tensors to files", "save the model again")
    outside = [name for name in placed.values() if Path(name).name != name]
    if outside:
        raise UnreadableFile(f"`{path}` names a file outside of its folder: `{outside[0]}`")
    return placed


def _absent_shards(shards: Sequence[Path]) -> list[Path]:
    """The shards that the names of the others count and that are not there."""
    counts = {int(match[2]) for shard in shards if (match := _SHARD.search(shard.name))}
    names = {shard.name for shard in shards}
    pattern, total = shards[0].name, max(counts, default=0)
    head, _, tail = pattern.partition(match[0]) if (match := _SHARD.search(pattern)) else (pattern, "", "")
    width = len(match[1]) if match else 0
    wanted = [f"{head}-{n:0{width}d}-of-{total:0{width}d}.{tail}" for n in range(1, total + 1)]
    return [shards[0].with_name(name) for name in wanted if name not in names]


def _require(folder: Path, absent: Sequence[Path], placed: Mapping[str, str]) -> None:
    if not absent:
        return
    names = ", ".join(file.name for file in absent)
    held = [tensor for tensor, home in placed.items() if home in {file.name for file in absent}]
    raise UnreadableFile(
        f"`{folder}` is not whole: {names} {'is' if len(absent) == 1 else 'are'} missing{_about(held)}",
        "copy or download the missing files",
    )


def _about(tensors: Sequence[str]) -> str:
    """What a shard holds, in a few words: `, which holds layers 3-5 and model.norm.weight`."""
    if not tensors:
        return ""
    layers = sorted({layer for tensor in tensors if (layer := layer_of(tensor)) is not None})
    loose = [tensor for tensor in tensors if layer_of(tensor) is None]
    parts = [f"{'layer' if len(layers) == 1 else 'layers'} {ranges(layers)}"] if layers else []
    return f", which holds {' and '.join([*parts, *loose[:3]])}"


def _tensors(file: Path, expected: Sequence[str]) -> list[StoredTensor]:
    try:
        return _of_pickle(file) if file.suffix == PICKLES[1] else _of_safetensors(file)
    except UnreadableFile as error:
        raise UnreadableFile(error.message + _about(expected), error.hint) from error


def _of_safetensors(file: Path) -> list[StoredTensor]:
    return [
        StoredTensor(header.name, header.dtype, header.shape, file, _reader(file, header))
        for header in open_weights(file).tensors.values()
    ]


def _reader(file: Path, header: TensorHeader) -> Callable[[int, int, Bytes | None], Raw]:
    storage, width = DTYPES[header.dtype]

    def read(start: int, stop: int, into: Bytes | None) -> Raw:
        return read_bytes(file, header, start * width, stop * width, into).view(storage)

    return read


def _of_pickle(file: Path) -> list[StoredTensor]:
    """A `.bin` through torch's weights-only loader, mapped: nothing of it is executed, little of it is in memory."""
    try:
        import torch
    except ImportError as error:
        raise UnreadableFile(
            f"`{file}` is a pickle, and torch is not installed", "pip install 'lora-probe[peft]'"
        ) from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # torch raises what its unpickler meets: UnpicklingError, RuntimeError, EOFError, KeyError ...
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnreadableFile(f"torch's weights-only loader refuses `{file}`: {reason}") from error
    tensors = of_torch(found if isinstance(found, dict) else {}, file)
    if not tensors:
        raise UnreadableFile(f"`{file}` holds no tensors")
    return tensors


def of_torch(found: Mapping[str, Any], file: Path) -> list[StoredTensor]:
    """The torch tensors of a dictionary, read where they are."""
    import torch

    names = {str(getattr(torch, long)): short for short, long in _TORCH.items() if hasattr(torch, long)}
    tensors = []
    for name, tensor in found.items():
        if isinstance(tensor, torch.Tensor):
            dtype = names.get(str(tensor.dtype))
            if dtype is None:
                raise UnreadableFile(f"`{file}`: tensor `{name}` is {tensor.dtype}, which is not understood")
            tensors.append(StoredTensor(str(name), dtype, tuple(tensor.shape), file, _tensor_reader(tensor, dtype)))
    return tensors


_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def _tensor_reader(tensor: Any, dtype: str) -> Callable[[int, int, Bytes | None], Raw]:
    import torch

    storage = np.dtype(DTYPES[dtype][0])
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[storage.itemsize]

    def read(start: int, stop: int, into: Bytes | None) -> Raw:
        stretch: Raw = tensor.reshape(-1)[start:stop].view(bits).numpy().view(storage)
        return stretch

    return read
