"""What the loads of a trace multiply with: G and a digest for each module of each load.

In: the live A and s·B of a load, taken once when its slots were filled; or the same read from segments. Out: `Placed`,
joined over the segments of a trace, and `grams_of`, the one way to the G of a row: a row has the G of its own load, and
a row of no load has none.
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
    """One load, module by module. A digest is "" where the load holds nothing, or where what it holds is not known.
    `gram` is G of the placed s·B, `[modules, r, r]`, NaN where it is not known; None below its level."""

    digests: tuple[str, ...]
    gram: Floats | None = None


@dataclass(frozen=True)
class Held:
    """What one load multiplies with at one module: `gram` is `[r, r]`."""

    gram: Floats
    digest: str


def grams_of(placed: Mapping[int, Placed], load: int, module: int) -> Held | None:
    """What rows of `load` are weighed with at a module; None for rows of no load (-1), and where it was not kept."""
    of_load = placed.get(load)
    if of_load is None or of_load.gram is None:
        return None
    gram, digest = of_load.gram[module], of_load.digests[module]
    # A damaged adapter's G may hold NaN, and then it is known all the same.
    return Held(gram, digest) if digest or np.isfinite(gram).all() else None


def digest_of(a: Floats, scaled_b: Floats) -> str:
    """What two runs compare to know that they multiply with the same numbers: A and s·B in float32."""
    digest = hashlib.sha256(np.ascontiguousarray(a).tobytes())
    digest.update(np.ascontiguousarray(scaled_b).tobytes())
    return digest.hexdigest()[:16]


def same_loads(one: Mapping[int, Placed], two: Mapping[int, Placed]) -> bool:
    """Whether the loads that are in both hold the same numbers in both."""
    return all(one[load].digests == two[load].digests for load in one.keys() & two.keys())


def joined_placed(
    parts: Iterable[tuple[tuple[Key, ...], Mapping[int, Placed]]], keys: tuple[Key, ...]
) -> dict[int, Placed]:
    """The loads of all parts with a place for each of `keys`. A part names its modules.

    A load that holds other numbers in a later part (its slot was filled again, with something else) has no G and no
    digest there: none holds for all of its rows.
    """
    numbers = {key: number for number, key in enumerate(keys)}
    loads: dict[int, _Joining] = {}
    added: dict[int, tuple[tuple[Key, ...], Placed]] = {}
    for modules, placed in parts:
        for load, of_load in placed.items():
            # Engines hand one and the same on with every step.
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
        if self._gram is None and part.gram is not None:
            self._gram = np.full((len(self._digests), *part.gram.shape[1:]), np.nan, np.float32)
        for index, (column, digest) in enumerate(zip(where, part.digests, strict=True)):
            before = self._digests[column]
            if before and digest and before != digest:
                self._disputed.add(column)
                continue
            # G goes with its digest: one without a digest only fills a place where there is none.
            new = self._unknown(column) if digest == before else bool(digest)
            if new and self._gram is not None and part.gram is not None:
                self._gram[column] = part.gram[index]
            self._digests[column] = digest or before

    def result(self) -> Placed:
        for column in self._disputed:
            self._digests[column] = ""
            if self._gram is not None:
                self._gram[column] = np.nan
        return Placed(tuple(self._digests), self._gram)

    def _unknown(self, column: int) -> bool:
        return self._gram is not None and bool(np.isnan(self._gram[column]).any())
