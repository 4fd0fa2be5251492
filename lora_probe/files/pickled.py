"""A `.bin`: weights that torch pickled, through torch's weights-only loader. Nothing of the file is executed.

In: a path. Out: a `WeightsFile` whose values torch holds; or, for whole models, the dictionary itself. The file is
mapped, so that little of it is in memory, unless it has the format used before torch 1.6, which cannot be mapped. What
the loader trusts is checked first: the archive's directory, its records, and the pickle (`pickle_opcodes.py`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_probe.errors import NeedsLibrary, TooLarge, UnreadableFile, out_of_memory
from lora_probe.files.limits import importing, make_room, step
from lora_probe.files.pickle_opcodes import require_harmless
from lora_probe.files.pickle_zip import PickleRecord, pickle_record
from lora_probe.files.untrusted import HEAD, brief, is_text, opened, shown, wrong_file_type
from lora_probe.files.weights import TensorHeader, WeightsFile, open_weights, require_real_name
from lora_probe.precision import DTYPES, STORED

if TYPE_CHECKING:
    from lora_probe.files.values import Raw

ZIP, PROTOCOL = b"PK\x03\x04", b"\x80"
MAX_LEGACY = 2**30
"""Bytes of an adapter in the format used before torch 1.6, which is read into memory as a whole."""
_LEGACY_HEAD = 8_000_000
"""Bytes in which the pickles of such a file must end, before its values begin."""
MOST_SHARED = 16
"""The values of all tensors together may be this many times the size of the file, as tensors can share bytes. A model
with tied embeddings uses some bytes twice."""


def open_pickle(path: Path) -> WeightsFile:
    """The weights of an adapter in a `.bin` or `.pt`.

    Raises:
        UnreadableFile: torch refuses the file, or it holds something other than named tensors.
        TooLarge: its tensors share their values, and claim far more together than the file has.
    """
    state = load(path, MAX_LEGACY)
    if not isinstance(state, dict):
        raise UnreadableFile(
            f"`{path}` holds a {type(state).__name__}, not a dictionary of tensors",
            "save the state dict: torch.save(get_peft_model_state_dict(model), path)",
        )
    with opened(path) as (_, size):
        pass
    tensors = dict(_named(state, path, size))
    if state and not tensors:
        raise _no_tensors(state, path)
    require_own_values(path, [header.end for header, _ in tensors.values()], size)
    held = {name: tensor for name, (_, tensor) in tensors.items()}

    def values(name: str, start: int, stop: int) -> Raw:
        return values_of(held[name], headers[name].dtype, start, stop)

    headers = {name: header for name, (header, _) in tensors.items()}
    return WeightsFile(path, size, {}, headers, values)


def open_by_content(path: Path) -> WeightsFile | None:
    """The weights in a file whose name may be wrong; None if it is neither safetensors nor a pickle.

    Raises as `open_weights` and `open_pickle` do.
    """
    with opened(path) as (file, _):
        start = file.read(HEAD)
    if start[8:9] == b"{":
        return open_weights(path)
    return open_pickle(path) if start.startswith((ZIP, PROTOCOL)) else None


def _named(state: dict[Any, Any], path: Path, size: int) -> Iterator[tuple[str, tuple[TensorHeader, Any]]]:
    for header, tensor in plain(state, path, "save the adapter again"):
        # A tensor that repeats its values (stride 0) can claim any number of them.
        if header.end > max(size, 1024):
            raise UnreadableFile(
                f"`{path}`: tensor `{shown(header.name)}` claims {header.end} bytes, the file has {size}",
                "save the adapter again, with contiguous tensors",
            )
        yield header.name, (header, tensor)


def require_own_values(path: Path, claimed: Sequence[int], size: int) -> None:
    """Refuse a file of `size` bytes whose tensors claim far more bytes than that.

    Raises:
        TooLarge: many tensors share the same bytes.
    """
    if sum(claimed) > MOST_SHARED * max(size, 1024):
        raise TooLarge(
            f"`{path}`: its {len(claimed):,} tensors claim {sum(claimed):,} bytes together, more than {MOST_SHARED} "
            f"times the {size:,} of the file",
            "save it again, with tensors that do not share their values",
        )


def _no_tensors(state: dict[Any, Any], path: Path) -> UnreadableFile:
    for key, value in dict.items(state):
        if isinstance(value, dict) and any(hasattr(inner, "layout") for inner in dict.values(value)):
            return UnreadableFile(
                f"`{path}` holds its tensors under the key {brief(key)}, which no loader reads",
                f"save that part by itself: torch.save(state[{brief(key)}], path)",
            )
    kinds = sorted({type(value).__name__ for value in dict.values(state)})
    return UnreadableFile(
        f"`{path}` holds no tensors: its {len(state)} entries are of type {', '.join(kinds[:5])}",
        "save the state dict of the adapter again",
    )


def load(path: Path, largest_legacy: int | None = None) -> Any:
    """The contents of a `.bin`. `largest_legacy`: the most bytes of a file that cannot be mapped.

    Raises:
        NeedsLibrary: torch is not installed.
        UnreadableFile: torch's weights-only loader does not accept the file.
    """
    step("checking the pickle", path)
    with opened(path) as (file, size):
        start = file.read(HEAD)
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
            f"`{path}` is a pickle, which needs torch, and torch is not installed", "pip install 'lora-probe[peft]'"
        ) from error
    if mapped:
        make_room(size)
    step("loading the pickle with torch", path)
    try:
        # It warns about features that torch plans to remove: typed storages, sparse tensors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError as error:
        raise out_of_memory(f"`{path}`") from error
    # torch does not catch the errors of its unpickler: UnpicklingError, RuntimeError, EOFError, KeyError ...
    except Exception as error:
        if "alloc_cpu" in str(error):
            raise out_of_memory(f"`{path}`") from error
        raise UnreadableFile(
            f"torch's weights-only loader refuses `{path}`: {_reason(error)}",
            "copy or download it again; never load a file that executes code",
        ) from error
    if record is not None and isinstance(state, dict):
        _require_own_records(path, state, record)
    return state


def _require_own_records(path: Path, state: dict[Any, Any], record: PickleRecord) -> None:
    """torch maps as many bytes at the offset of a record as the pickle asks for, so the sizes must be compared."""
    import torch

    for name, tensor in dict.items(state):
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or _not_plain(tensor):
            continue
        if (size := torch.Tensor.untyped_storage(tensor).nbytes()) not in record.storages:
            raise UnreadableFile(
                f"`{path}`: tensor {brief(name)} claims a record of {size} bytes, and the file has none of that size",
                "copy or download it again, or save it again with torch.save",
            )


def _refuse_others(path: Path, start: bytes) -> None:
    if start.startswith((ZIP, PROTOCOL)):
        return
    if start[8:9] == b"{" and start[:8].endswith(b"\0\0\0\0"):
        name = path.with_suffix(".safetensors").name
        raise UnreadableFile(f"`{path}` is a safetensors file, not a torch pickle", f"rename it to {name}")
    raise UnreadableFile(
        f"`{path}` is not a torch pickle: it begins with {brief(start[:8])}", "copy or download it again"
    )


def _check_archive(path: Path, file: BinaryIO, record: PickleRecord) -> None:
    file.seek(record.start)
    require_harmless(file.read(record.size), path)


def _check_legacy(path: Path, file: BinaryIO, size: int, largest: int | None) -> None:
    if largest is not None and size > largest:
        raise UnreadableFile(
            f"`{path}` has {size} bytes in the format used before torch 1.6, which cannot be memory-mapped",
            "save it again with torch.save or as safetensors",
        )
    file.seek(0)
    # The magic number, the protocol, the system, the objects, the keys of the storages.
    require_harmless(file.read(_LEGACY_HEAD), path, 5)


_CAUSE = re.compile(r"WeightsUnpickler error:|(?=Trying to load )")
_PARAGRAPH = re.compile(r"\n\s*\n|\nframe #")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def _reason(error: Exception) -> str:
    """The first sentence of torch's message or, in a long one, the first that names a cause."""
    text = str(error)
    if cause := _CAUSE.search(text):
        text = text[cause.end() :]
    words = " ".join(_PARAGRAPH.split(text.strip())[0].split())
    sentence = shown(_SENTENCE.split(words)[0].rstrip("."), 300)
    # The message of a KeyError is the key alone, that of an EOFError is empty.
    return sentence if " " in sentence else ": ".join(filter(None, (type(error).__name__, sentence)))


def plain(state: dict[Any, Any], path: Path, hint: str) -> Iterator[tuple[TensorHeader, Any]]:
    """The tensors of a dictionary with their headers; other entries are skipped.

    Raises:
        UnreadableFile: a tensor is not a plain array of values: sparse, nested, quantised, on the meta device.
        TooLarge: the name of a tensor is too long.
    """
    import torch

    # Objects from a pickle can have attributes of any name, so methods are called through their class.
    names = {f"torch.{dtype.name}": dtype.stored for dtype in DTYPES}
    for name, tensor in dict.items(state):
        if not isinstance(tensor, torch.Tensor):
            continue
        dtype = names.get(str(tensor.dtype))
        why = _not_plain(tensor) or (f"is {tensor.dtype}, which is not supported" if dtype is None else "")
        if not isinstance(name, str) or not is_text(name):
            why = "has a name that is not valid text"
        if dtype is None or why:
            raise UnreadableFile(f"`{path}`: tensor {brief(name)} {why}", hint)
        require_real_name(path, name)
        shape = tuple(tensor.shape)
        yield TensorHeader(name, dtype, shape, 0, math.prod(shape) * STORED[dtype].width), tensor


def _not_plain(tensor: Any) -> str:
    """Why the values of a torch tensor are not one array in memory; empty if they are."""
    import torch

    if tensor.is_meta:
        return "is on the meta device: it has no values"
    if tensor.is_nested:
        return "is a nested tensor, which is not supported"
    if tensor.is_quantized:
        return f"is quantised ({tensor.dtype}), which is not supported"
    return "" if tensor.layout == torch.strided else f"is sparse ({tensor.layout}), which is not supported"


def values_of(tensor: Any, dtype: str, start: int, stop: int) -> Raw:
    """Values of a torch tensor as they would be in a file: as one row, in numpy's storage type for `dtype`."""
    import numpy as np
    import torch

    storage = np.dtype(STORED[dtype].storage)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[storage.itemsize]
    values: Raw = torch.Tensor.detach(tensor).reshape(-1)[start:stop].resolve_neg().view(bits).numpy().view(storage)
    return values
