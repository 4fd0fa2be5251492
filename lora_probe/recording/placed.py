"""The weights that each load of a trace runs with, as G and a digest for each module.

In: the live A and s·B of a load, copied once when its slots were filled; or the same read from segments. Out: `Placed`,
joined over the segments of a trace, and `grams_of`, the only access to the G of a row: a row has the G of its own load,
and a row without a load has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.names import Key

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Placed:
    """One load, module by module. A digest is "" if the load has nothing at a module, or if that is unknown.
    `gram` is G of the placed s·B, `[modules, r, r]`, NaN if unknown; None if the level of detail does not keep it."""

    digests: tuple[str, ...]
    gram: Floats | None = None


@dataclass(frozen=True)
class Held:
    """The weights that one load runs with at one module: `gram` is `[r, r]`."""

    gram: Floats
    digest: str


def grams_of(placed: Mapping[int, Placed], load: int, module: int) -> Held | None:
    """The G that rows of `load` need at a module; None for rows without a load (-1), and if it was not kept."""
    of_load = placed.get(load)
    if of_load is None or of_load.gram is None:
        return None
    gram, digest = of_load.gram[module], of_load.digests[module]
    # The G of a damaged adapter may contain NaN and still be known: then it has a digest.
    return Held(gram, digest) if digest or np.isfinite(gram).all() else None


def digest_of(a: Floats, scaled_b: Floats) -> str:
    """A digest of A and s·B in float32. Two runs with the same digest run with the same weights."""
    digest = hashlib.sha256(np.ascontiguousarray(a).tobytes())
    digest.update(np.ascontiguousarray(scaled_b).tobytes())
    return digest.hexdigest()[:16]


def at_rank(gram: Floats, rank: int) -> Floats:
    """G `[..., r, r]` padded to a larger rank. An adapter has nothing beyond its own rank: zero."""
    more = rank - gram.shape[-1]
    return np.pad(gram, [(0, 0)] * (gram.ndim - 2) + [(0, more)] * 2) if more > 0 else gram


def same_loads(one: Mapping[int, Placed], two: Mapping[int, Placed]) -> bool:
    """Whether the loads that are in both have the same weights in both."""
    return all(one[load].digests == two[load].digests for load in one.keys() & two.keys())


def joined_placed(
    parts: Iterable[tuple[tuple[Key, ...], Mapping[int, Placed]]], keys: tuple[Key, ...]
) -> dict[int, Placed]:
    """The loads of all parts, with a column for each of `keys`. Each part comes with its modules.

    A load whose weights differ in a later part (its slot was filled again, with other values) has no G and no digest
    at that module, as none is right for all of its rows.
    """
    numbers = {key: number for number, key in enumerate(keys)}
    loads: dict[int, _Joining] = {}
    added: dict[int, tuple[tuple[Key, ...], Placed]] = {}
    for modules, placed in parts:
        for load, of_load in placed.items():
            # Engines pass the same object with every step.
            if load in added and added[load][1] is of_load and added[load][0] == modules:
                continue
            added[load] = modules, of_load
            where = [numbers[key] for key in modules]
            loads.setdefault(load, _Joining(len(keys))).add(where, of_load)
    return {load: joining.result() for load, joining in loads.items()}


class _Joining:
    """One load while its parts are joined."""

    def __init__(self, count: int) -> None:
        self._digests = [""] * count
        self._gram: Floats | None = None
        self._disputed: set[int] = set()

    def add(self, where: list[int], part: Placed) -> None:
        gram = part.gram
        if gram is not None:
            rank = gram.shape[-1]
            if self._gram is None:
                self._gram = np.full((len(self._digests), rank, rank), np.nan, np.float32)
            rank = max(rank, self._gram.shape[-1])
            self._gram, gram = at_rank(self._gram, rank), at_rank(gram, rank)
        for index, (column, digest) in enumerate(zip(where, part.digests, strict=True)):
            before = self._digests[column]
            if before and digest and before != digest:
                self._disputed.add(column)
                continue
            # G belongs to its digest: a G without a digest is only used if there is none yet.
            new = self._unknown(column) if digest == before else bool(digest)
            if new and self._gram is not None and gram is not None:
                self._gram[column] = gram[index]
            self._digests[column] = digest or before

    def result(self) -> Placed:
        for column in self._disputed:
            self._digests[column] = ""
            if self._gram is not None:
                self._gram[column] = np.nan
        return Placed(tuple(self._digests), self._gram)

    def _unknown(self, column: int) -> bool:
        return self._gram is not None and bool(np.isnan(self._gram[column]).any())
