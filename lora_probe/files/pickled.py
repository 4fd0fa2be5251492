"""A `.bin`: weights that torch pickled, through torch's weights-only loader. Nothing of the file is executed.

In: a path. Out: a `WeightsFile` whose values torch holds; or, for whole models, the dictionary itself. The file is
mapped, and little of it is in memory, unless it is in the format of before torch 1.6, which cannot be. What the loader
would believe is bounded first: the archive's directory, its records, and the pickle (`pickle_opcodes.py`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lora_probe.errors import NeedsLibrary, TooLarge, UnreadableFile, out_of_memory
from lora_probe.files.limits import importing, make_room, step
from lora_probe.files.pickle_opcodes import require_harmless
from lora_probe.files.pickle_zip import PickleRecord, pickle_record
from lora_probe.files.untrusted import brief, is_text, opened, shown, wrong_file_type
from lora_probe.files.weights import Raw, TensorHeader, WeightsFile, require_real_name
from lora_probe.precision import DTYPES, STORED

ZIP, PROTOCOL = b"PK\x03\x04", b"\x80"
MAX_LEGACY = 2**30
"""Bytes of an adapter in the format of before torch 1.6, which is read into memory as a whole."""
_LEGACY_HEAD = 8_000_000
"""Bytes in which the pickles of such a file must end, before its values begin."""
MOST_SHARED = 16
"""How often the bytes of a file may be values of its tensors: those of several tensors can be the same bytes. A model
with tied embeddings has some of them twice."""


def open_pickle(path: Path) -> WeightsFile:
    """The weights of an adapter in a `.bin` or `.pt`.

    Raises:
        UnreadableFile: torch is missing or refuses the file, or it holds something other than named tensors.
        TooLarge: its tensors share their values, and have far more together than the file.
    """
    found = load(path, MAX_LEGACY)
    if not isinstance(found, dict):
        raise UnreadableFile(
            f"`{path}` holds a {type(found).__name__}, not a dictionary of tensors",
            "save the state dict: torch.save(get_peft_model_state_dict(model), path)",
        )
    with opened(path) as (_, size):
        pass
    tensors = dict(_named(found, path, size))
    if found and not tensors:
        raise _no_tensors(found, path)
    require_own_values(path, [header.end for header, _ in tensors.values()], size)
    held = {name: tensor for name, (_, tensor) in tensors.items()}

    def values(name: str, start: int, stop: int) -> Raw:
        return values_of(held[name], headers[name].dtype, start, stop)

    headers = {name: header for name, (header, _) in tensors.items()}
    return WeightsFile(path, size, {}, headers, values)


def _named(found: dict[Any, Any], path: Path, size: int) -> Iterator[tuple[str, tuple[TensorHeader, Any]]]:
    for header, tensor in plain(found, path, "save the adapter again"):
        # A tensor that repeats its values (stride 0) can claim any number of them.
        if header.end > max(size, 1024):
            raise UnreadableFile(
                f"`{path}`: tensor `{shown(header.name)}` claims {header.end} bytes, the file has {size}",
                "save the adapter again, with contiguous tensors",
            )
        yield header.name, (header, tensor)


def require_own_values(path: Path, claimed: Sequence[int], size: int) -> None:
    """A file of `size` bytes has tensors that take these bytes.

    Raises:
        TooLarge: many tensors have the same bytes.
    """
    if sum(claimed) > MOST_SHARED * max(size, 1024):
        raise TooLarge(
            f"`{path}`: its {len(claimed):,} tensors claim {sum(claimed):,} bytes together, more than {MOST_SHARED} "
            f"times the {size:,} of the file",
            "save it again, with tensors that do not share their values",
        )


def _no_tensors(found: dict[Any, Any], path: Path) -> UnreadableFile:
    for key, value in dict.items(found):
        if isinstance(value, dict) and any(hasattr(inner, "layout") for inner in dict.values(value)):
            return UnreadableFile(
                f"`{path}` holds its tensors inside of {brief(key)}, where no loader looks",
                f"save that part by itself: torch.save(found[{brief(key)}], path)",
            )
    kinds = sorted({type(value).__name__ for value in dict.values(found)})
    return UnreadableFile(
        f"`{path}` holds no tensors: its {len(found)} entries are of the kind {', '.join(kinds[:5])}",
        "save the state dict of the adapter again",
    )


def load(path: Path, largest_legacy: int | None = None) -> Any:
    """What a `.bin` holds. `largest_legacy`: bytes of a file that cannot be mapped.

    Raises:
        NeedsLibrary: torch is not installed.
        UnreadableFile: the file is none that its weights-only loader takes.
    """
    step("checking the pickle", path)
    with opened(path) as (file, size):
        start = file.read(64)
        if wrong := wrong_file_type(start, "the weights"):
            raise UnreadableFile(f"`{path}` {wrong[0]}", wrong[1])
        _refuse_others(path, start)
        mapped = start.startswith(ZIP)
        record = pickle_record(path, file, size) if mapped else None
        if record is not None:
            _check_archive(path, file, record)
        else:
            _check_legacy(path, file, size, largest_legacy)
    try:
        with importing():
            import torch
    except ImportError as error:
        raise NeedsLibrary(
            f"`{path}` is a pickle, and torch is not installed", "pip install 'lora-probe[peft]'"
        ) from error
    if mapped:
        make_room(size)
    step("loading the pickle with torch", path)
    try:
        # It warns of what it will not keep for ever: typed storages, sparse tensors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError as error:
        raise out_of_memory(f"`{path}`") from error
    # torch raises what its unpickler meets: UnpicklingError, RuntimeError, EOFError, KeyError ...
    except Exception as error:
        if "alloc_cpu" in str(error):
            raise out_of_memory(f"`{path}`") from error
        raise UnreadableFile(
            f"torch's weights-only loader refuses `{path}`: {_reason(error)}",
            "copy or download it again; a file that calls for code is to be trusted by nobody",
        ) from error
    if record is not None and isinstance(found, dict):
        _require_own_records(path, found, record)
    return found


def _require_own_records(path: Path, found: dict[Any, Any], record: PickleRecord) -> None:
    """A mapped file gives whatever lies at the place of a record, as much of it as the pickle asks for."""
    import torch

    for name, tensor in dict.items(found):
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or _not_plain(tensor):
            continue
        if (size := torch.Tensor.untyped_storage(tensor).nbytes()) not in record.storages:
            raise UnreadableFile(
                f"`{path}`: tensor {brief(name)} claims a record of {size} bytes, and there is none of that size",
                "copy or download it again, or save it again with torch.save",
            )


def _refuse_others(path: Path, start: bytes) -> None:
    if start.startswith((ZIP, PROTOCOL)):
        return
    if start[8:9] == b"{" and start[:8].endswith(b"\0\0\0\0"):
        name = path.with_suffix(".safetensors").name
        raise UnreadableFile(f"`{path}` is a safetensors file, not a pickle of torch", f"rename it to {name}")
    raise UnreadableFile(
        f"`{path}` is not a pickle of torch: it begins with {brief(start[:8])}", "copy or download it again"
    )


def _check_archive(path: Path, file: BinaryIO, record: PickleRecord) -> None:
    file.seek(record.start)
    require_harmless(file.read(record.size), path)


def _check_legacy(path: Path, file: BinaryIO, size: int, largest: int | None) -> None:
    if largest is not None and size > largest:
        raise UnreadableFile(
            f"`{path}` has {size} bytes in the format of before torch 1.6, which cannot be mapped",
            "save it again with torch.save or as safetensors",
        )
    file.seek(0)
    # The magic number, the protocol, the system, the objects, the keys of the storages.
    require_harmless(file.read(_LEGACY_HEAD), path, 5)


_CAUSE = re.compile(r"WeightsUnpickler error:|(?=Trying to load )")
_PARAGRAPH = re.compile(r"\n\s*\n|\nframe #")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def _reason(error: Exception) -> str:
    """The first sentence of what torch says, or, where it explains itself at length, the first that names a cause."""
    text = str(error)
    if cause := _CAUSE.search(text):
        text = text[cause.end() :]
    words = " ".join(_PARAGRAPH.split(text.strip())[0].split())
    sentence = shown(_SENTENCE.split(words)[0].rstrip("."), 300)
    # A KeyError says the key alone, an EOFError nothing.
    return sentence if " " in sentence else ": ".join(filter(None, (type(error).__name__, sentence)))


def plain(found: dict[Any, Any], path: Path, hint: str) -> Iterator[tuple[TensorHeader, Any]]:
    """The tensors of a dictionary with their headers; other entries are passed over.

    Raises:
        UnreadableFile: one is not a plain array of values: sparse, nested, quantised, on the meta device.
        TooLarge: one has a name that is longer than any.
    """
    import torch

    # A pickle gives its objects attributes of any name: what is called is a method of the class.
    names = {f"torch.{dtype.name}": dtype.stored for dtype in DTYPES}
    for name, tensor in dict.items(found):
        if not isinstance(tensor, torch.Tensor):
            continue
        dtype = names.get(str(tensor.dtype))
        why = _not_plain(tensor) or (f"is {tensor.dtype}, which is not understood" if dtype is None else "")
        if not isinstance(name, str) or not is_text(name):
            why = "has a name that is no text"
        if dtype is None or why:
            raise UnreadableFile(f"`{path}`: tensor {brief(name)} {why}", hint)
        require_real_name(path, name)
        shape = tuple(tensor.shape)
        yield TensorHeader(name, dtype, shape, 0, math.prod(shape) * STORED[dtype].width), tensor


def _not_plain(tensor: Any) -> str:
    """Why the values of a torch tensor are not one array in memory, if so."""
    import torch

    if tensor.is_meta:
        return "is on the meta device: it has no values"
    if tensor.is_nested:
        return "is a nested tensor, which is not understood"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}), which is not understood"
    return "" if tensor.layout == torch.strided else f"is sparse ({tensor.layout}), which is not understood"


def values_of(tensor: Any, dtype: str, start: int, stop: int) -> Raw:
    """Values of a torch tensor as they would lie in a file: as one row, in numpy's storage type for `dtype`."""
    import torch

    storage = np.dtype(STORED[dtype].storage)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[storage.itemsize]
    values: Raw = torch.Tensor.detach(tensor).reshape(-1)[start:stop].resolve_neg().view(bits).numpy().view(storage)
    return values
