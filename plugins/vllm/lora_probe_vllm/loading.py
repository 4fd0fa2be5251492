"""The loads of one recording in a worker: from the arrival of an adapter to the end of its load.

In: what the patches observe: files that are read, tensors that are pushed, adapters that get a slot, lose it or are
removed. Out: the load timeline, and one `ActiveLoad` for each content under an id of the engine. An adapter that
arrives again unchanged is the same load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from lora_probe.adapter import PushedTensors, open_adapter, pushed_adapter
from lora_probe.base import Base
from lora_probe.errors import ProbeError
from lora_probe.names import Key, name_modules
from lora_probe.recording import REPLICA_LOADS, Load, TraceWriter
from lora_probe_vllm.arrivals import Arrival, adapter_of_model
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.seams import seams
from lora_probe_vllm.slots import Homes
from lora_probe_vllm.steps import Steps
from lora_probe_vllm.strict import Strict


class Surroundings(Protocol):
    """What the loads need to know of their worker."""

    homes: Homes | None
    base: Base | None
    strict: Strict

    @property
    def dtype(self) -> str:
        """The coarsest dtype in which LoRA layers compute."""

    @property
    def records_rows(self) -> bool:
        """Whether the rows of steps are recorded."""

    def why_unmeasured(self, active: ActiveLoad, key: Key) -> str | None:
        """Why the rows of a module were not recorded; None if they were."""

    def publish(self) -> None:
        """Bring the metrics up to date."""


class Loading:
    """The loads of one recording."""

    def __init__(
        self,
        writer: TraceWriter,
        steps: Steps,
        generations: dict[int, int],
        worker: Surroundings,
        loads: dict[int, ActiveLoad],
    ) -> None:
        self.loads = loads
        self.writer, self.steps = writer, steps
        self._generations, self._worker = generations, worker
        self._numbers = writer.process.replica * REPLICA_LOADS
        self._arriving: dict[int, ActiveLoad] = {}
        self._repeated: ActiveLoad | None = None
        self._silent = False
        self._request: Any = None
        self._seen = True
        self.inside = False
        self._dummy = False
        self._dummies: set[int] = set()

    @contextmanager
    def handling(self, request: Any) -> Iterator[None]:
        """vLLM handles a LoRARequest. A framework that calls the LoRA manager directly has none."""
        before, self._request, self._seen = self._request, request, False
        try:
            yield
        finally:
            self._request = before

    def failed(self, error: BaseException) -> None:
        """vLLM could not add the adapter of a request. It is a refused load only if the adapter had arrived."""
        if not self._seen:
            self.writer.event("refused", f"{self._request.lora_name}, before vLLM read it: {_message(error)}")

    @contextmanager
    def arrival(self) -> Iterator[None]:
        """vLLM loads an adapter; the loaders that it calls inside are part of this arrival."""
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    @contextmanager
    def adding_dummies(self) -> Iterator[None]:
        """vLLM adds adapters of zeros, for profiling and for idle steps. They are not loads."""
        self._dummy = True
        try:
            yield
        finally:
            self._dummy = False

    def active_of(self, adapter_id: int) -> ActiveLoad | None:
        """The load that vLLM means by an id now; None for an adapter that the recording did not see arrive."""
        return None if adapter_id in self._dummies else self.loads.get(adapter_id)

    def event(self, stage: str, text: str, **facts: Any) -> None:
        """A detail of a load in the timeline; nothing while an unchanged adapter is read again."""
        if self._repeated is None:
            self.writer.event(stage, text, **facts)

    def _is_silent(self, active: ActiveLoad) -> bool:
        """Whether a load is being reloaded in place, which may happen in every step."""
        return active is self._repeated and self._silent

    def reading(self, adapter_id: int, path: str) -> ActiveLoad | None:
        """An adapter is about to be read: record the contents of its file before vLLM reads it."""
        folder = seams.adapter_path(path)
        try:
            adapter = open_adapter(folder)
        except ProbeError as error:
            self.writer.event("read", f"{path}: {error.message}")
            return None
        return self._begin(Arrival.of(adapter_id, adapter, self._request), f"from {folder}")

    def received(self, adapter_id: int, tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> ActiveLoad | None:
        """Tensors were pushed, with the `fields` of a config: record what arrived before vLLM converts it."""
        try:
            pushed = PushedTensors(tensors)
            adapter = pushed_adapter(pushed, fields)
        except ProbeError as error:
            self.writer.event("read", f"adapter {adapter_id}: {error.message}")
            return None
        active = self._begin(Arrival.of(adapter_id, adapter, self._request), "pushed as tensors")
        pushed.settle(keep=not active.cached)
        return active

    def _begin(self, arrival: Arrival, how: str) -> ActiveLoad:
        """A new load, or an earlier one if the same content arrives again under its id."""
        worker = self._worker
        assert worker.homes is not None
        self._repeated, self._seen = None, True
        adapter_id, tensors = arrival.adapter_id, len(arrival.adapter.weights.tensors)
        before = self.loads.get(adapter_id)
        if before is not None and before.is_unchanged(arrival):
            self._repeated, self._silent = before, arrival.inplace
            if arrival.inplace:
                before.record.reloaded()
            else:
                self.writer.event("read", f"{arrival.name} {how} again, unchanged", tensors=tensors)
            return before
        number, self._numbers = self._numbers, self._numbers + 1
        generation = self._generations[adapter_id] = self._generations.get(adapter_id, -1) + 1
        load = Load(number, arrival.name, arrival.path, arrival.digest, adapter_id, generation)
        active = ActiveLoad.begin(arrival, load, self.writer, worker.homes, worker.base, worker.dtype)
        self.event("read", f"{arrival.name} {how}", tensors=tensors)
        return active

    def was_read(self, adapter_id: int, active: ActiveLoad, lora: Any, seconds: float | None = None) -> None:
        """The loader has finished, and `read` is judged. The adapter is not in the engine yet."""
        self._forget(adapter_id, active)
        self._arriving[adapter_id] = active
        self.event("read", f"{len(lora.loras)} pairs accepted", seconds=seconds)

    def adding(self, lora: Any) -> ActiveLoad | None:
        """An adapter enters the engine. An earlier load with the same id has ended."""
        adapter_id = int(lora.id)
        if self._dummy:
            self._dummies.add(adapter_id)
            return None
        self._dummies.discard(adapter_id)
        if adapter_id not in self._arriving:
            self._built_by_hand(lora)
        active = self._arriving.pop(adapter_id)
        if self.loads.get(adapter_id) is not active:
            self._retire(adapter_id, "when it was replaced")
            self.loads[adapter_id] = active
        return active

    def _built_by_hand(self, lora: Any) -> None:
        """A model of an adapter that no loader of vLLM made: what it holds is all that is known of it."""
        homes = self._worker.homes
        assert homes is not None
        adapter, pushed = adapter_of_model(lora, homes.manager.packed_modules)
        arrival = Arrival.of(int(lora.id), adapter, self._request, engine_names=True)
        active = self._begin(arrival, "arrived as a LoRAModel")
        pushed.settle(keep=not active.cached)
        active.judge_read(lora)
        self.was_read(int(lora.id), active, lora)

    def refused(self, active: ActiveLoad, error: BaseException, stage: str) -> None:
        self._repeated, self._seen = None, True
        self._arriving.pop(active.adapter_id, None)
        message = _message(error)
        self.writer.event("refused", f"while vLLM was {stage}: {message}")
        active.record.refused(message)

    def filling(self, active: ActiveLoad) -> None:
        """vLLM is about to fill the slot of a load."""
        if active is not self._repeated:
            self._repeated = None

    def activated(
        self, active: ActiveLoad, slot: int, seconds: float | None, logged: list[str], moment: str = "at activation"
    ) -> None:
        """The slot is filled: compare it with the adapter, and record the load's layers from now on."""
        active.slot = slot
        if active is not self._repeated or active.record.load.slot != slot:
            active.record.activated(slot, logged)
        if not self._is_silent(active):
            self.writer.event("activate", f"{active.record.load.name} is in slot {slot}", seconds=seconds)
        active.judge_slots(moment)
        self._worker.strict.in_slot(active)
        self._worker.publish()
        if self._worker.records_rows:
            self.steps.activated(active.adapter_id, active)
        self._repeated = None

    def half_filled(self, active: ActiveLoad, slot: int) -> None:
        """vLLM failed while it filled a slot. It serves the adapter from there when it is asked again, but what the
        slot holds is not the adapter: rows that request it are not its rows."""
        active.slot = slot
        active.record.activated(slot, [])
        self.writer.event("activate", f"{active.record.load.name} is in slot {slot}, which vLLM failed to fill")
        active.judge_slots("after vLLM failed to fill it")
        if names := active.leftovers():
            text = f"slot {slot} still contains weights of an earlier adapter, which vLLM did not reset"
            self.writer.event("stale", f"{text}: {name_modules(names)}", modules=names)
        active.slot = None
        self._repeated = None

    def evicted(self, adapter_id: int, why: str = "") -> None:
        """The adapter loses its slot: judge it now, as its contents will be replaced."""
        active = self.active_of(adapter_id)
        if active is not None and active.slot is not None:
            if not self._is_silent(active):
                self.writer.event("evict", f"{active.record.load.name} removed from slot {active.slot}{why}")
            active.judge_slots("when it was evicted")
            active.slot = None
            self.steps.deactivated(adapter_id)

    def all_removed(self) -> None:
        """vLLM empties its tables at once: after a dummy run, and when the base's weights are replaced."""
        self._dummies.clear()
        for adapter_id in list(self.loads):
            self.evicted(adapter_id, " with all adapters")

    def removed(self, adapter_id: int) -> None:
        """vLLM removes an adapter. If its successor is arriving, it is only replaced."""
        active = self.active_of(adapter_id)
        if active is not None and adapter_id not in self._arriving:
            self.writer.event("unload", f"{active.record.load.name} removed from the engine")
            self._retire(adapter_id, "when it was unloaded")

    def finish(self) -> None:
        """The recording ends: judge the slots again, and write the last stations of every load."""
        for adapter_id in list(self._arriving):
            self._forget(adapter_id)
        for adapter_id in list(self.loads):
            self._retire(adapter_id)

    def _forget(self, adapter_id: int, successor: ActiveLoad | None = None) -> None:
        """A load was read, and vLLM never added it."""
        waiting = self._arriving.pop(adapter_id, None)
        if waiting is not None and waiting is not successor and waiting is not self.loads.get(adapter_id):
            waiting.record.finish(lambda _: "it was read, but never added to the engine")

    def _retire(self, adapter_id: int, moment: str = "when the run ended") -> None:
        """Write the last stations of a load that ends."""
        active = self.loads.pop(adapter_id, None)
        if active is None:
            return
        if active.slot is not None:
            active.judge_slots(moment)
        self.steps.settle(adapter_id)
        # vLLM may serve requests with an adapter that it refused, from a slot that is half filled.
        if not active.record.load.refused or active.record.requested:
            active.record.finish(lambda key: self._worker.why_unmeasured(active, key), active.why_unjudged)
        active.record.finish_requests()
        self.steps.deactivated(adapter_id)


def _message(error: BaseException) -> str:
    return " ".join(str(error).split()) or f"{type(error).__name__} without a message"
