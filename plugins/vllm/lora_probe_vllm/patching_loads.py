"""The patches around the arrival of an adapter in vLLM: requested, read or pushed, packed, added.

In: the `Patches` to add to, and how to find the probe of a LoRA manager. Out: loads, with `stored` and `read`, in that
probe. Frameworks replace `_load_adapter` of the subclass that vLLM uses, or go past it, so every way that an adapter
may take is observed, and what happens inside one of them belongs to it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from lora_probe_vllm.arrivals import fields_of
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.observing import Find, LogLines, listening, refusing
from lora_probe_vllm.patching_slots import patch_slots
from lora_probe_vllm.seams import Patches, seams
from lora_probe_vllm.worker import Probe

Current = Callable[[], Probe | None]


def patch_loads(patches: Patches, probe_of_manager: Find, recording: Current) -> None:
    """Add all of them. `recording` returns the probe that records in this process, if any."""
    log = LogLines()
    _patch_requests(patches, probe_of_manager)
    _patch_files(patches, probe_of_manager, recording, log)
    _patch_tensors(patches, recording, log)
    _patch_adding(patches, probe_of_manager, log)
    _patch_packing(patches, recording)
    patch_slots(patches, probe_of_manager, log)


def _patch_requests(patches: Patches, probe_of_manager: Find) -> None:
    """Know whose adapter arrives, and which ones are dummies."""

    def add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self._adapter_manager)
            if probe is None or not probe.recording:
                return original(self, lora_request, *args, **kwargs)
            with probe.loading.handling(lora_request):
                try:
                    return original(self, lora_request, *args, **kwargs)
                except Exception as error:
                    with probe.guard("a refusal"):
                        probe.loading.failed(error)
                    raise

        return wrapper

    def add_dummy_lora(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self._adapter_manager)
            if probe is None or not probe.recording:
                return original(self, *args, **kwargs)
            with probe.loading.adding_dummies():
                return original(self, *args, **kwargs)

        return wrapper

    patches.wrap(seams.worker_manager, "add_adapter", add_adapter)
    patches.wrap(seams.lru_worker_manager, "add_adapter", add_adapter)
    patches.wrap(seams.worker_manager, "add_dummy_lora", add_dummy_lora)


def _patch_files(patches: Patches, probe_of_manager: Find, recording: Current, log: LogLines) -> None:
    """Record what vLLM reads from a file."""

    def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self._adapter_manager)
            if probe is None or not probe.recording:
                return original(self, lora_request, *args, **kwargs)
            adapter_id, path = int(lora_request.lora_int_id), str(lora_request.lora_path)
            with probe.loading.handling(lora_request):
                return _arriving(
                    probe,
                    log,
                    adapter_id,
                    lambda: probe.loading.reading(adapter_id, path),
                    lambda: original(self, lora_request, *args, **kwargs),
                )

        return wrapper

    def from_local_checkpoint(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(cls: Any, lora_dir: str, *args: Any, lora_model_id: int | None = None, **kwargs: Any) -> Any:
            def load() -> Any:
                return original(cls, lora_dir, *args, lora_model_id=lora_model_id, **kwargs)

            probe = recording()
            if probe is None or lora_model_id is None:
                return load()
            return _arriving(probe, log, lora_model_id, lambda: probe.loading.reading(lora_model_id, lora_dir), load)

        return wrapper

    patches.wrap(seams.worker_manager, "_load_adapter", load_adapter)
    patches.wrap(seams.lora_model, "from_local_checkpoint", from_local_checkpoint)


def _patch_tensors(patches: Patches, recording: Current, log: LogLines) -> None:
    """Record the tensors that vLLM gets without a file, and the config that comes with them."""
    configs: deque[tuple[Any, Mapping[str, Any]]] = deque(maxlen=8)

    def from_lora_tensors(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(cls: Any, lora_model_id: int, tensors: Any, peft_helper: Any, *args: Any, **kwargs: Any) -> Any:
            def load() -> Any:
                return original(cls, lora_model_id, tensors, peft_helper, *args, **kwargs)

            probe = recording()
            if probe is None:
                return load()
            loading = probe.loading

            def receive() -> ActiveLoad | None:
                config = next((config for helper, config in configs if helper is peft_helper), None)
                return loading.received(lora_model_id, tensors, fields_of(peft_helper, config))

            return _arriving(probe, log, lora_model_id, receive, load)

        return wrapper

    def from_dict(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(cls: Any, config_dict: Any, *args: Any, **kwargs: Any) -> Any:
            helper = original(cls, config_dict, *args, **kwargs)
            if recording() is not None:
                configs.append((helper, dict(config_dict)))
            return helper

        return wrapper

    patches.wrap(seams.lora_model, "from_lora_tensors", from_lora_tensors)
    patches.wrap(seams.peft_helper, "from_dict", from_dict)


def _arriving(
    probe: Probe, log: LogLines, adapter_id: int, begin: Callable[[], ActiveLoad | None], load: Callable[[], Any]
) -> Any:
    """Run one of vLLM's ways to load an adapter, unless it is part of another one."""
    if probe.loading.inside:
        return load()
    log.lines.clear()
    active = None
    with probe.guard("reading the adapter"):
        active = begin()
    started = time.perf_counter()
    with probe.loading.arrival():
        try:
            with listening(log):
                lora = load()
        except Exception as error:
            if active is not None:
                with probe.guard("a refusal"):
                    probe.loading.refused(active, error, "reading the adapter")
            raise
    if active is not None:
        seconds = round(time.perf_counter() - started, 6)
        with probe.guard("what the loader read"):
            active.judge_read(lora)
        probe.strict.after_reading(active)
        with probe.guard("an adapter that was read"):
            probe.loading.was_read(adapter_id, active, lora, seconds)
    return lora


def _patch_adding(patches: Patches, probe_of_manager: Find, log: LogLines) -> None:
    """Record how vLLM converts an adapter."""

    def add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora: Any, *args: Any, **kwargs: Any) -> Any:
            probe, active = probe_of_manager(self), None
            # After a failure it is not known what has arrived.
            if probe is not None and probe.recording and not probe.broken:
                with probe.guard("adding the adapter"):
                    active = probe.loading.adding(lora)
            if probe is None or active is None:
                return original(self, lora, *args, **kwargs)
            before, started = len(lora.loras), time.perf_counter()
            with refusing(probe, active, "packing the adapter"), listening(log):
                result = original(self, lora, *args, **kwargs)
            with probe.guard("registering"):
                probe.loading.event(
                    "register",
                    f"{before} pairs became {len(lora.loras)} weights; every scaling was folded into lora_B",
                    seconds=round(time.perf_counter() - started, 6),
                )
            return result

        return wrapper

    patches.wrap(seams.manager, "_add_adapter", add_adapter)


def _patch_packing(patches: Patches, current: Current) -> None:
    def pack(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(cls: Any, loras: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            packed = original(cls, loras, *args, **kwargs)
            probe = current()
            if probe is not None and probe.loads:
                names = [lora.module_name.rpartition(".")[2] for lora in loras if lora is not None]
                with probe.guard("packing"):
                    probe.loading.event(
                        "pack",
                        f"{', '.join(names)} -> one packed weight",
                        module=next(lora.module_name for lora in loras if lora is not None).rpartition(".")[0],
                        seconds=round(time.perf_counter() - started, 6),
                    )
            return packed

        return wrapper

    def optimize(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            scaling = self.scaling
            started = time.perf_counter()
            result = original(self, *args, **kwargs)
            probe = current()
            folded = scaling != self.scaling
            if folded and probe is not None and probe.loads:
                with probe.guard("folding"):
                    probe.loading.event(
                        "fold",
                        f"lora_B *= {scaling:g}",
                        module=self.module_name,
                        seconds=round(time.perf_counter() - started, 6),
                        scaling=scaling,
                    )
            return result

        return wrapper

    patches.wrap(seams.packed_weights, "pack", pack)
    patches.wrap(seams.layer_weights, "optimize", optimize)
