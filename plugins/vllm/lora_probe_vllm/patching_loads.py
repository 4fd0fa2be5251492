"""The patches around an adapter's life in vLLM: read, packed, put into a slot, removed from it.

In: the `Patches` to add to, and how to find the probe of a LoRA manager. Out: events and stations in that probe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_probe_vllm.seams import Patches, seams
from lora_probe_vllm.worker import Probe

Find = Callable[[Any], Probe | None]


class _LogLines(logging.Handler):
    """Collects what vLLM logs at INFO or above while an adapter is loaded."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def patch_loads(patches: Patches, probe_of_manager: Find, recording: Callable[[], Probe | None]) -> None:
    """Add all of them. `recording` returns the probe that records in this process, if any."""
    log = _LogLines()
    _patch_loading(patches, probe_of_manager, log)
    _patch_slots(patches, probe_of_manager, log)
    _patch_packing(patches, recording)


def _patch_loading(patches: Patches, probe_of_manager: Find, log: _LogLines) -> None:
    """Record what vLLM reads from the file, and how it converts it."""

    def load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora_request: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self._adapter_manager)
            if probe is None or not probe.recording:
                return original(self, lora_request, *args, **kwargs)
            log.lines.clear()
            active = None
            with probe.guard("reading the adapter's file"):
                active = probe.reading(lora_request)
            started = time.perf_counter()
            try:
                with _listening(log):
                    lora = original(self, lora_request, *args, **kwargs)
            except Exception as error:
                if active is not None:
                    with probe.guard("a refusal"):
                        probe.refused(active, error, "reading the adapter")
                raise
            if active is not None:
                seconds = round(time.perf_counter() - started, 6)
                with probe.guard("what the loader read"):
                    active.judge_read(lora)
                probe.strict.after_reading(active)
                with probe.guard("a load that was read"):
                    probe.was_read(int(lora_request.lora_int_id), active, lora, seconds)
            return lora

        return wrapper

    def add_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self)
            active = probe.loads.get(lora.id) if probe is not None and probe.recording else None
            if probe is None or active is None:
                return original(self, lora, *args, **kwargs)
            before, started = len(lora.loras), time.perf_counter()
            with _refusing(probe, active, "packing the adapter"), _listening(log):
                result = original(self, lora, *args, **kwargs)
            with probe.guard("registering"):
                probe.writer.event(
                    "register",
                    f"{before} pairs became {len(lora.loras)} weights; every scaling was folded into lora_B",
                    seconds=round(time.perf_counter() - started, 6),
                )
            return result

        return wrapper

    patches.wrap(seams.worker_manager, "_load_adapter", load_adapter)
    patches.wrap(seams.manager, "_add_adapter", add_adapter)


def _patch_slots(patches: Patches, probe_of_manager: Find, log: _LogLines) -> None:
    """Record what vLLM puts into a slot, and when it removes it."""

    def activate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora_id: int, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self)
            active = probe.loads.get(lora_id) if probe is not None and probe.recording else None
            # vLLM calls this in every step; only a call that fills a slot is an event.
            if probe is None or active is None or lora_id in self._active_adapters:
                return original(self, lora_id, *args, **kwargs)
            started = time.perf_counter()
            with (
                _refusing(probe, active, "filling the slot"),
                _listening(log),
                _watching_slots(probe, self.modules),
            ):
                result = original(self, lora_id, *args, **kwargs)
            seconds = round(time.perf_counter() - started, 6)
            with probe.guard("the slot"):
                probe.activated(lora_id, self.lora_index_to_id.index(lora_id), seconds, list(log.lines))
            return result

        return wrapper

    def deactivate_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, lora_id: int, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of_manager(self)
            if probe is not None and probe.recording and lora_id in probe.loads:
                with probe.guard("an eviction"):
                    probe.evicted(lora_id)
            return original(self, lora_id, *args, **kwargs)

        return wrapper

    patches.wrap(seams.manager, "activate_adapter", activate_adapter)
    patches.wrap(seams.manager, "_deactivate_adapter", deactivate_adapter)


def _patch_packing(patches: Patches, current: Callable[[], Probe | None]) -> None:
    def pack(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(cls: Any, loras: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            packed = original(cls, loras, *args, **kwargs)
            probe = current()
            if probe is not None and probe.loads:
                names = [lora.module_name.rpartition(".")[2] for lora in loras if lora is not None]
                with probe.guard("packing"):
                    probe.writer.event(
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
                    probe.writer.event(
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


@contextmanager
def _listening(log: _LogLines) -> Iterator[None]:
    """Collect what vLLM's loggers report at INFO or above."""
    logger = logging.getLogger("vllm")
    logger.addHandler(log)
    try:
        yield
    finally:
        logger.removeHandler(log)


@contextmanager
def _refusing(probe: Probe, active: Any, stage: str) -> Iterator[None]:
    """Record an exception of vLLM as its refusal of the adapter, and raise it again."""
    try:
        yield
    except Exception as error:
        with probe.guard("a refusal"):
            probe.refused(active, error, stage)
        raise


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
                                    probe.writer.event(word, f"slot {index}", module=name, seconds=seconds)

                    return wrapper

                patches.wrap(layer, method, make)
        yield
