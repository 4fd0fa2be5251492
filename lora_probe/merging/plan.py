"""Everything that an adapter does to a base: `Plan`.

In: an adapter and a `View` of the base. Out: its sites in the order of computing, what has no site and why, and why no
merge of this adapter can be judged, if there is a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_probe.adapter import Adapter, AdapterModule
from lora_probe.adapter.variants import initialisation, variants_of
from lora_probe.base import Checkpoint
from lora_probe.files import brief
from lora_probe.merging.experts import of_experts
from lora_probe.merging.names import Names
from lora_probe.merging.overlay import View
from lora_probe.merging.sites import Placed, Site, Unplaced, of_other, of_pair
from lora_probe.names import natural


@dataclass(frozen=True)
class Plan:
    """`refusals` are the reasons why nothing in the merged model can be judged."""

    sites: tuple[Site, ...]
    unplaced: tuple[Unplaced, ...]
    refusals: tuple[str, ...]

    def by_tensor(self) -> dict[str, list[Site]]:
        sites: dict[str, list[Site]] = {}
        for site in self.sites:
            sites.setdefault(site.tensor, []).append(site)
        return sites


def plan(adapter: Adapter, seen: View) -> Plan:
    """Place every tensor of `adapter` that is not the base's own."""
    names = Names(seen.base.tensors)
    placed: list[Site | Unplaced] = []
    for module in adapter.modules:
        placed += _of_module(adapter, module, seen.base, names)
    for other in seen.others:
        placed += of_other(adapter, other, seen.base, names)
    sites = sorted((place for place in placed if isinstance(place, Site)), key=lambda site: natural(site.label))
    unplaced = tuple(place for place in placed if isinstance(place, Unplaced))
    return Plan(tuple(sites), unplaced, tuple(refusals(adapter)))


def _of_module(adapter: Adapter, module: AdapterModule, base: Checkpoint, names: Names) -> Placed:
    if module.a is None or module.b is None:
        yield Unplaced(module.module, "half of its pair is missing")
    elif len(module.a.shape) != 2 or len(module.b.shape) != 2:
        shapes = f"A is {list(module.a.shape)} and B {list(module.b.shape)}"
        yield Unplaced(module.module, f"{shapes}: it is not a linear layer")
    elif module.a.shape[0] % module.blocks[0] or module.b.shape[0] % module.blocks[1]:
        yield Unplaced(module.module, "its rows are not as many blocks as use_bdlora says")
    elif module.parameter == "weight":
        yield from of_pair(adapter, module, base, names)
    else:
        yield from of_experts(module, base, names)


def refusals(adapter: Adapter) -> Iterator[str]:
    """Why a merge of `adapter` cannot be judged."""
    raw = adapter.config.raw
    for variant in variants_of(raw):
        if variant.not_replayed:
            yield f"the adapter uses {variant.title}: {variant.not_replayed}"
    init = raw.get("init_lora_weights")
    row = initialisation(init)
    if row is not None and row.base in ("of data", "in training"):
        yield f"init_lora_weights is {brief(init)}: it changed the base by data that is not here"
    if row is not None and row.base == "random":
        yield f"init_lora_weights is {brief(init)}: the part that it took out of the base is random"
