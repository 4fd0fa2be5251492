"""A slot in a worker whose modules hold the weights of either of two runs.

In: the loads of both adapters, each in a slot of its own. Out: the slot of the reference, with the weights of the
candidate in some modules. Requests for the reference's id then run with the mixture.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from lora_probe.names import Key
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.slots import Home, Placement, slot_views

REFERENCE_ID, CANDIDATE_ID = 1, 2
"""The engine's ids of the two adapters."""

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Place:
    """One slice of a layer, and the modules that have it in each run: two files may name it differently."""

    home: Home
    modules: frozenset[str]
    before: list[Pair]
    after: list[Pair]


class MixedSlot:
    """The slot of the reference. `as_loaded`: for each id, whether its weights are those in its slot, right or wrong,
    or those of its file. `off` are the modules that the candidate runs without an adapter, `factors` those that it runs
    at another scale than its file has.

    Raises:
        ValueError: an adapter is not in a slot, or vLLM has no layer for a module that changes.
        ProbeError: the file of a large adapter cannot be read any more.
    """

    def __init__(
        self,
        loads: Mapping[int, ActiveLoad],
        changed: Collection[str],
        off: Collection[str],
        factors: Mapping[str, float],
        as_loaded: Mapping[int, bool],
    ) -> None:
        reference, candidate = loads.get(REFERENCE_ID), loads.get(CANDIDATE_ID)
        if reference is None or candidate is None or reference.slot is None or candidate.slot is None:
            raise ValueError("the adapters are not in slots")
        self._slot = reference.slot
        homes: dict[tuple[int, int, str], Home] = {}
        keys: dict[tuple[int, int, str], list[Key]] = {}
        for load in (reference, candidate):
            for key, home in load.homes.items():
                if slot_views(_parts(home)[0], self._slot) is not None:
                    place = id(home.layer), home.slice, home.fused
                    homes.setdefault(place, home)
                    keys.setdefault(place, []).append(key)
        _require(changed, {key[0] for of_place in keys.values() for key in of_place}, (reference, candidate))
        self._places = [
            _Place(
                home,
                frozenset(key[0] for key in keys[place]),
                _weights(reference, home, keys[place], as_loaded[REFERENCE_ID]),
                _weights(candidate, home, keys[place], as_loaded[CANDIDATE_ID], off, factors),
            )
            for place, home in homes.items()
        ]

    def mix(self, changed: Collection[str]) -> None:
        """Give these modules the weights of the candidate, and all others those of the reference."""
        chosen = frozenset(changed)
        for place in self._places:
            pairs = place.after if place.modules & chosen else place.before
            for part, pair in zip(_parts(place.home), pairs, strict=True):
                views = slot_views(part, self._slot)
                assert views is not None
                for view, values in zip(views, pair, strict=True):
                    view.zero_()
                    view[: values.shape[0], : values.shape[1]] = values


def _require(changed: Collection[str], known: set[str], loads: tuple[ActiveLoad, ...]) -> None:
    """Raises ValueError: a module has no layer whose slot can be written, on this rank or on another one."""
    elsewhere = {key[0] for load in loads for key, name in load.names.items() if load.engine.on_another_rank(name)}
    if missing := sorted(set(changed) - known - elsewhere):
        raise ValueError(f"vLLM has no LoRA layer for {missing[0]}, or one whose slots are not read yet")


def _weights(
    load: ActiveLoad,
    home: Home,
    keys: Collection[Key],
    as_loaded: bool,
    off: Collection[str] = (),
    factors: Mapping[str, float] | None = None,
) -> list[Pair]:
    """A and s·B of every part of a layer in one run; empty where the adapter has nothing."""
    assert load.slot is not None
    key = next((key for key in keys if key in load.homes), None)
    pairs = []
    for part in _parts(home):
        views = slot_views(part, load.slot)
        assert views is not None
        if as_loaded:
            pairs.append((views[0].clone(), views[1].clone()))
        elif key is None or key[0] in off or (placement := _placement(load, key, home, part)) is None:
            pairs.append((views[0][:0], views[1][:0]))
        else:
            a, b = placement.replayed(views[0].dtype)
            factor = (factors or {}).get(key[0], 1.0)
            pairs.append((a.to(views[0].device), (b if factor == 1 else b * factor).to(views[1].device)))
    return pairs


def _placement(load: ActiveLoad, key: Key, home: Home, part: Home) -> Placement | None:
    return load.of_experts(key).get(part.expert) if home.split else load.placement(key)


def _parts(home: Home) -> list[Home]:
    """The slices of a module: one, or those of all experts."""
    return list(home.parts) if home.split else [home]
