"""A slot in a worker whose modules hold the weights of either of two runs.

In: the loads of both adapters, each in a slot of its own. Out: the slot of the reference, with the weights of the
candidate in some modules. Requests for the reference's id then run with the mixture.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from lora_probe.names import Key
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.slots import Home, Placement, slot_views

REFERENCE_ID, CANDIDATE_ID = 1, 2
"""The engine's ids of the two adapters."""

Pair = tuple[torch.Tensor, torch.Tensor]


class MixedSlot:
    """The slot of the reference. `as_loaded`: for each id, whether its weights are those in its slot, right or wrong,
    or those of its file; `off` are the modules that the candidate runs without an adapter.

    Raises:
        ValueError: an adapter is not in a slot, or vLLM has no layer for a module that changes.
    """

    def __init__(
        self,
        loads: Mapping[int, ActiveLoad],
        changed: Collection[str],
        off: Collection[str],
        as_loaded: Mapping[int, bool],
    ) -> None:
        reference, candidate = loads.get(REFERENCE_ID), loads.get(CANDIDATE_ID)
        if reference is None or candidate is None or reference.slot is None or candidate.slot is None:
            raise ValueError("the adapters are not in slots")
        homes = reference.homes | {key: home for key, home in candidate.homes.items() if key not in reference.homes}
        self._slot = reference.slot
        self._homes = {key: home for key, home in homes.items() if slot_views(_parts(home)[0], self._slot) is not None}
        if missing := sorted(set(changed) - {key[0] for key in self._homes}):
            raise ValueError(f"vLLM has no LoRA layer for {missing[0]}, or one whose slots are not read yet")
        self._before = _weights(reference, self._homes, as_loaded[REFERENCE_ID], ())
        self._after = _weights(candidate, self._homes, as_loaded[CANDIDATE_ID], off)

    def mix(self, changed: Collection[str]) -> None:
        """Give these modules the weights of the candidate, and all others those of the reference."""
        for key, home in self._homes.items():
            pairs = self._after if key[0] in changed else self._before
            for part, pair in zip(_parts(home), pairs[key], strict=True):
                views = slot_views(part, self._slot)
                assert views is not None
                for view, values in zip(views, pair, strict=True):
                    view.zero_()
                    view[: values.shape[0], : values.shape[1]] = values


def _weights(
    load: ActiveLoad, homes: Mapping[Key, Home], as_loaded: bool, off: Collection[str]
) -> dict[Key, list[Pair]]:
    """A and s·B of every part of each module in one run; empty where the adapter has nothing."""
    assert load.slot is not None
    weights = {}
    for key, home in homes.items():
        expected: list[Placement | None] = []
        if key in load.homes and key[0] not in off:
            of_experts = load.of_experts(key) if home.split else {}
            expected = [of_experts.get(part.expert) if home.split else load.placement(key) for part in _parts(home)]
        pairs = []
        for number, part in enumerate(_parts(home)):
            views = slot_views(part, load.slot)
            assert views is not None
            if as_loaded:
                pairs.append((views[0].clone(), views[1].clone()))
            elif expected and (placement := expected[number]) is not None:
                a, b = placement.replayed(views[0].dtype)
                pairs.append((a.to(views[0].device), b.to(views[1].device)))
            else:
                pairs.append((views[0][:0], views[1][:0]))
        weights[key] = pairs
    return weights


def _parts(home: Home) -> list[Home]:
    """The slices of a module: one, or those of all experts."""
    return list(home.parts) if home.split else [home]
