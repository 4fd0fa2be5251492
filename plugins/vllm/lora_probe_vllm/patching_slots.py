"""The patches around the slots of vLLM's LoRA layers: filled, emptied, and adapters removed.

In: the `Patches` to add to, and how to find the probe of a LoRA manager. Out: `placed` of each load and its slot, in
that probe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_probe_vllm.loading import Loading
from lora_probe_vllm.observing import Find, LogLines, listening, refusing
from lora_probe_vllm.seams import Patches, seams
from lora_probe_vllm.worker import Probe


def patch_slots(patches: Patches, probe_of_manager: Find, log: LogLines) -> None:
    """Add all of them."""
    _patch_activation(patches, probe_of_manager, log)
    _patch_removal(patches, probe_of_manager)


def _patch_activation(patches: Patches, probe_of_manager: Find, log: LogLines) -> None:
    def activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora_id: int, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self)
            active = probe.loading.active_of(lora_id) if probe is not None and probe.recording else None
            if probe is None or active is None:
                return original(self, lora_id, *args, **kwargs)
            if lora_id in self._active_adapters:
                # vLLM calls this in every step, and fills no slot that the id has already. A framework that adds other
                # weights under the id and does not remove the old ones first goes on with the old ones.
                result = original(self, lora_id, *args, **kwargs)
                if active.slot is None and not active.record.load.refused and not probe.broken:
                    with probe.guard("the slot"):
                        if (slot := _slot_of(self, lora_id)) is not None:
                            probe.loading.activated(active, slot, None, [], "in a slot that vLLM did not fill again")
                return result
            started = time.perf_counter()
            probe.loading.filling(active)
            try:
                with (
                    refusing(probe, active, "filling the slot"),
                    listening(log),
                    _watching_slots(probe, self.modules),
                ):
                    result = original(self, lora_id, *args, **kwargs)
            except Exception:
                # vLLM has registered the adapter in the slot before it fills it, and serves it when asked again.
                with probe.guard("a half-filled slot"):
                    if (slot := _slot_of(self, lora_id)) is not None:
                        probe.loading.half_filled(active, slot)
                raise
            seconds = round(time.perf_counter() - started, 6)
            with probe.guard("the slot"):
                if (slot := _slot_of(self, lora_id)) is not None:
                    probe.loading.activated(active, slot, seconds, list(log.lines))
            return result

        return wrapper

    patches.wrap(seams.manager, "activate_adapter", activate_adapter)


def _slot_of(manager: Any, adapter_id: int) -> int | None:
    """The slot that an id has in vLLM's own table."""
    ids = manager.lora_index_to_id
    return ids.index(adapter_id) if adapter_id in ids else None


def _patch_removal(patches: Patches, probe_of_manager: Find) -> None:
    def before(stage: str, record: Callable[..., None]) -> Callable[..., Any]:
        """Record a removal before vLLM does it. `record` is a method of `Loading` with the same arguments."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
                probe = probe_of_manager(self)
                if probe is not None and probe.recording:
                    with probe.guard(stage):
                        record(probe.loading, *args, *kwargs.values())
                return original(self, *args, **kwargs)

            return wrapper

        return make

    patches.wrap(seams.manager, "_deactivate_adapter", before("an eviction", Loading.evicted))
    patches.wrap(seams.manager, "remove_adapter", before("a removal", Loading.removed))
    patches.wrap(seams.manager, "remove_all_adapters", before("an eviction", Loading.all_removed))


@contextmanager
def _watching_slots(probe: Probe, layers: dict[str, Any]) -> Iterator[None]:
    """Record each layer's set_lora or reset_lora, with its time, while a slot is filled."""
    with Patches() as patches:
        for name, layer in layers.items():
            busy: list[bool] = []
            for method in ("set_lora", "reset_lora"):

                def make(original: Any, name: str = name, method: str = method, busy: list[bool] = busy) -> Any:
                    def wrapper(index: int, *args: Any, **kwargs: Any) -> Any:
                        outermost = not busy
                        busy.append(True)
                        started = time.perf_counter()
                        try:
                            return original(index, *args, **kwargs)
                        finally:
                            busy.pop()
                            # set_lora begins with a reset, which is not a separate step of the timeline.
                            if outermost:
                                seconds = round(time.perf_counter() - started, 6)
                                word = method.partition("_")[0]
                                with probe.guard("a slot"):
                                    probe.loading.event(word, f"slot {index}", module=name, seconds=seconds)

                    return wrapper

                patches.wrap(layer, method, make)
        yield
