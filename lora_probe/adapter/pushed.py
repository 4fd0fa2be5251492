"""An adapter without files: tensors that a training framework pushed into an engine.

In: torch tensors by their names, and the fields of a config. Out: an `Adapter` as from a folder, whose digest covers
names, dtypes, shapes, values and fields. Its values must be read, or copied by `settle`, before the framework goes on:
it may free or overwrite its tensors, and vLLM scales those that it shares in place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_probe.adapter.checkpoint import Adapter, sort_tensors
from lora_probe.adapter.config import config_of
from lora_probe.errors import UnreadableFile
from lora_probe.files.pickled import plain, values_of
from lora_probe.files.weights import TensorHeader, WeightsFile

if TYPE_CHECKING:
    from lora_probe.files.values import Raw

PUSHED = Path("pushed as tensors")
"""The path of such an adapter, in messages and in the trace."""
MOST_COPIED = 2**30
"""Bytes of tensors that are copied. Rank 64 on all linear modules of an 8B model has 340 MB in bfloat16, of a 70B model
1.7 GB."""


class PushedTensors:
    """The values of pushed tensors: at first the framework's own, and after `settle` copies on the host or nothing."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        pairs = list(plain(dict(tensors.items()), PUSHED, "push plain dense tensors"))
        self.headers: dict[str, TensorHeader] = {header.name: header for header, _ in pairs}
        self.size = sum(header.end for header, _ in pairs)
        self._tensors = {header.name: tensor.detach() for header, tensor in pairs}

    def values(self, name: str, start: int, stop: int) -> Raw:
        """Some values of a tensor, as they would be in a file.

        Raises:
            UnreadableFile: they were not kept.
        """
        if name not in self._tensors:
            limit = f"; the limit for a copy is {MOST_COPIED:,}" if self.size > MOST_COPIED else ""
            raise UnreadableFile(f"no copy of the pushed tensors was kept ({self.size:,} bytes{limit})")
        return values_of(self._tensors[name].cpu(), self.headers[name].dtype, start, stop)

    def digest(self, fields: Mapping[str, Any]) -> str:
        """SHA-256 of the tensors and of a config's fields, in the form of the digest of two files."""
        import msgspec

        weights = hashlib.sha256()
        for name, header in sorted(self.headers.items()):
            weights.update(msgspec.json.encode([name, header.dtype, header.shape]))
            weights.update(self.values(name, 0, header.parameters).tobytes())
        config = hashlib.sha256(msgspec.json.encode(fields, order="deterministic"))
        return config.hexdigest()[:32] + weights.hexdigest()[:32]

    def settle(self, *, keep: bool) -> None:
        """From now on the framework and the engine may change the tensors: with `keep` copy them, if they are not
        larger than MOST_COPIED."""
        kept = self._tensors if keep and self.size <= MOST_COPIED else {}
        self._tensors = {name: tensor.to("cpu", copy=True) for name, tensor in kept.items()}


def pushed_adapter(tensors: PushedTensors, fields: Mapping[str, Any]) -> Adapter:
    """The adapter that `tensors` form with a config of `fields`.

    Raises:
        UnreadableFile: a field has the wrong type.
    """
    fields = {key: _plain(value) for key, value in fields.items()}
    config = config_of(fields, PUSHED)
    weights = WeightsFile(PUSHED, tensors.size, {}, tensors.headers, tensors.values)
    modules, others = sort_tensors(weights.tensors, config)
    return Adapter(PUSHED, config, weights, modules, others, (), content=tensors.digest(fields))


def _plain(value: Any) -> Any:
    """A field as JSON would have it: frameworks pass PEFT's own objects, with sets and enumerations."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
