"""One module of an adapter, in detail.

In: an adapter, and the end of a module's path. Out: the matching module, or an error that lists the candidates; and
facts about its values: singular values of s·B·A, norms, and a corner of A and B.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.adapter.checkpoint import Adapter, AdapterModule
from lora_probe.adapter.spectrum import Spectrum, pair_spectrum
from lora_probe.errors import ProbeError, UnreadableFile
from lora_probe.files import shown
from lora_probe.files.weights import TensorHeader
from lora_probe.names import PREFIX

CORNER = (4, 6)
"""How many rows and columns of a tensor are shown."""
_CANDIDATES = 8
_HALVES = (".weight", ".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B")


@dataclass(frozen=True)
class TensorValues:
    """Norm and corner of one tensor; `why` they are missing (not floats, or too many values)."""

    tensor: TensorHeader
    norm: float | None
    corner: npt.NDArray[np.float32] | None
    why: str = ""


@dataclass(frozen=True)
class OneModule:
    """One module with its values. `tensors`: A, B and the extras; `spectrum` is None if A and B are not a pair."""

    adapter: Adapter
    module: AdapterModule
    tensors: tuple[TensorValues, ...]
    spectrum: Spectrum | None


def select(adapter: Adapter, name: str) -> OneModule:
    """The module that matches `name`, with its values.

    Raises:
        ProbeError: no module ends in `name`, or several do.
    """
    module = find(adapter, name)
    tensors = tuple(_values(adapter, tensor) for tensor in module.tensors)
    return OneModule(adapter, module, tensors, pair_spectrum(adapter, module))


def find(adapter: Adapter, name: str) -> AdapterModule:
    """The one module whose path is `name` or ends in it. Raises as `select` does."""
    wanted = name.strip().removeprefix(PREFIX).strip(".")
    for half in _HALVES:
        wanted = wanted.removesuffix(half)
    named = {path: module for module in adapter.modules for path in _paths(module)}
    exact = [module for module in adapter.modules if wanted in _paths(module)]
    ends = [module for module in adapter.modules if any(path.endswith(f".{wanted}") for path in _paths(module))]
    for matches in (exact, ends):
        if len(matches) == 1 and wanted:
            return matches[0]
        if matches and wanted:
            raise ProbeError(
                f"`{shown(name)}` matches {len(matches)} modules in `{adapter.path}`", _list(matches, "pass one of")
            )
    if not adapter.modules:
        raise ProbeError(
            f"`{adapter.path}` holds no module with lora_A or lora_B", f"run lora-probe inspect {adapter.path}"
        )
    if whole := [other for other in adapter.others if _same(other.tensor.name, wanted)]:
        raise ProbeError(
            f"`{shown(name)}` is in `{adapter.path}`, but not as lora_A and lora_B: {whole[0].what}",
            f"run lora-probe inspect {adapter.path}",
        )
    last = wanted.rpartition(".")[2]
    alike = [path for path in named if path.endswith(f".{last}")] or list(named)
    close = difflib.get_close_matches(wanted[:200], [path[:200] for path in alike[:5000]], _CANDIDATES, 0.0)
    closest = [named[path] for path in close if path in named]
    raise ProbeError(f"no module in `{adapter.path}` ends in `{shown(name)}`", _list(closest, "try one of"))


def _paths(module: AdapterModule) -> tuple[str, ...]:
    """The names of a module that are accepted: for fused experts also that of their parameter."""
    names = (label(module), module.stored_as) if module.parameter != "weight" else (module.module, module.stored_as)
    return tuple(dict.fromkeys((*names, module.module)))


def label(module: AdapterModule) -> str:
    """The path of a module, with its parameter if that is not the weight."""
    return module.module if module.parameter == "weight" else f"{module.module}.{module.parameter}"


def _same(tensor: str, wanted: str) -> bool:
    plain = tensor.removeprefix(PREFIX).removesuffix(".weight")
    return bool(wanted) and (plain == wanted or plain.endswith(f".{wanted}"))


def _list(modules: list[AdapterModule], word: str) -> str:
    names = list(dict.fromkeys(shown(label(module)) for module in modules))
    more = f" and {len(names) - _CANDIDATES} more" if len(names) > _CANDIDATES else ""
    return f"{word}: {', '.join(names[:_CANDIDATES])}{more}"


def _values(adapter: Adapter, tensor: TensorHeader) -> TensorValues:
    try:
        values = adapter.values(tensor)
    except UnreadableFile as error:
        return TensorValues(tensor, None, None, error.message)
    flat = values.reshape(-1, values.shape[-1]) if values.ndim and values.size else values.reshape(-1, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        norm = float(np.linalg.norm(flat.astype(np.float64)))
    return TensorValues(tensor, norm, flat[: CORNER[0], : CORNER[1]])
