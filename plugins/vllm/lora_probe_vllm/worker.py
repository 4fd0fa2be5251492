"""The probe in a vLLM worker: the load timeline, and the stations of every load from `stored` to `agrees`.

In: what the patches observe, from the worker's construction on. Out: the folder `vllm-rank-N/` of a trace. A failure of
the probe never fails a request: it is recorded, and the probe stops.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec

from lora_probe.adapter import open_adapter
from lora_probe.base import Base, open_base
from lora_probe.engines.load_record import LoadRecord
from lora_probe.errors import ProbeError
from lora_probe.names import Key
from lora_probe.precision import coarser
from lora_probe.recording import LEVELS, SCHEMA, Level, Load, Process, Run, RunSpec, TraceWriter
from lora_probe.rules.stored import expect
from lora_probe_vllm import KEEP, METRICS, switched_on
from lora_probe_vllm.control import RequestedLevel
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.metrics import Metrics
from lora_probe_vllm.seams import engine_settings, manager_of, model_of, seams, vllm_version, why_not_recordable
from lora_probe_vllm.slots import Homes
from lora_probe_vllm.steps import Steps
from lora_probe_vllm.strict import Strict
from lora_probe_vllm.watcher import Watcher


class Probe:
    """The state of the probe in one worker, from the worker's construction until `finish`."""

    def __init__(self, worker: Any, folder: Path) -> None:
        self.worker = worker
        self.rank = int(worker.rank)
        self.homes: Homes | None = None
        self.base: Base | None = None
        self.loads: dict[int, ActiveLoad] = {}
        self.not_recorded: str | None = None
        self.broken = False
        self.strict = Strict(self.guard)
        self.metrics = Metrics(self.rank) if switched_on(METRICS) else None
        self._generations: dict[int, int] = {}
        self._writer: TraceWriter | None = None
        self._watcher: Watcher | None = None
        self._numbers = 0
        self._outputs_of: list[str] = []
        self.open(folder)
        # A user's own script ends without a call of `finish`.
        atexit.register(self.finish)

    @property
    def writer(self) -> TraceWriter:
        assert self._writer is not None
        return self._writer

    @property
    def recording(self) -> bool:
        return self._writer is not None

    def open(self, folder: Path, keep: Level | None = None) -> None:
        """Begin to write into `folder`, or into a numbered folder next to it if this rank has written there before.

        `keep` is the level of detail if there is no run.json; the default is that of the environment.
        """
        self.finish()
        first, number = folder, 1
        while (folder / f"vllm-rank-{self.rank}").exists():
            number += 1
            folder = first.with_name(f"{first.stem}-{number}{first.suffix}")
        if number > 1:
            logging.getLogger("vllm.lora_probe").warning("%s exists; this recording goes to %s", first, folder)
        spec = _requested(folder)
        self.keep = keep if keep is not None and spec is None else level_of(folder)
        self.broken, self._numbers = False, 0
        self._outputs_of = list(spec.watch) if spec is not None else []
        self._sketching = spec is not None and spec.score
        self.steps = Steps(self.keep, self.guard, self._sketching)
        config = self.worker.vllm_config
        settings = engine_settings(config)
        process = Process(
            schema=SCHEMA,
            role="worker",
            engine="vllm",
            rank=self.rank,
            pid=os.getpid(),
            versions={"vllm": vllm_version()},
            keep=self.keep,
            device=str(config.device_config.device_type),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            lora_dtype=settings.get("lora_dtype", ""),
            settings=settings,
            not_recorded=self.not_recorded,
        )
        self._writer = TraceWriter(folder / f"vllm-rank-{self.rank}", process)
        self._writer.flush_by_time()
        self.requested = RequestedLevel(self._writer)
        self._watcher = Watcher(self._each_second)
        if self.homes is not None:
            for name, layer in self.homes.manager.modules.items():
                self.wrapped(name, layer)
            self._record_manager("replaced before this recording began")

    @contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """Record a failure of the probe instead of raising it into vLLM."""
        try:
            yield
        # Any exception: the request must not fail because of it. It is recorded and shown.
        except Exception as error:
            self.broken = True
            self.steps.capture.abandon()
            text = f"the probe failed at `{stage}` and stopped: {error!r}"
            logging.getLogger("vllm.lora_probe").error(text)
            try:
                self.writer.event("probe", text)
            except OSError:
                # The disk is full or gone: nothing more can be recorded, and the reason is in the log.
                self._writer = None

    def model_loaded(self, runner: Any, seconds: float) -> None:
        """The LoRA manager was created, and the model's layers were replaced in place."""
        self.homes = Homes(manager_of(runner))
        config = self.worker.vllm_config
        self.not_recorded = why_not_recordable(config, runner)
        self.writer.describe(not_recorded=self.not_recorded)
        self._record_manager("replaced", seconds)
        try:
            self.base = open_base(config.model_config.model)
        except ProbeError as error:
            self.writer.event("base", f"the files of the base model cannot be read here: {error.message}")

    def _record_manager(self, when: str, seconds: float | None = None) -> None:
        assert self.homes is not None
        manager = self.homes.manager
        self.writer.event(
            "manager",
            f"{type(manager).__name__} created, {len(manager.modules)} layers {when} in {type(manager.model).__name__}",
            seconds=seconds,
            slots=manager.lora_slots,
            max_lora_rank=manager.lora_config.max_lora_rank,
        )

    def wrapped(self, name: str, layer: Any) -> None:
        base = type(getattr(layer, "base_layer", layer)).__name__
        self.writer.event(
            "wrap",
            f"{base} -> {type(layer).__name__}",
            module=name,
            slices=list(getattr(layer, "output_slices", ())),
            tp_rank=getattr(layer, "tp_rank", 0),
            tp_size=getattr(layer, "tp_size", 1),
        )

    def reading(self, request: Any) -> ActiveLoad | None:
        """An adapter is about to be read: record the contents of its file before vLLM reads it."""
        assert self.homes is not None
        adapter_id = int(request.lora_int_id)
        path = seams.adapter_path(str(request.lora_path))
        try:
            adapter = open_adapter(path)
        except ProbeError as error:
            self.writer.event("read", f"{request.lora_name}: {error.message}")
            return None
        number, self._numbers = self._numbers, self._numbers + 1
        generation = self._generations[adapter_id] = self._generations.get(adapter_id, -1) + 1
        load = Load(number, request.lora_name, str(adapter.path), adapter.digest(), adapter_id, generation)
        config = self.worker.vllm_config
        dtypes = (config.model_config.dtype, self.homes.manager.lora_config.lora_dtype)
        dtype = coarser(*(str(value).removeprefix("torch.") for value in dtypes))
        names = self.homes.of_base(self.base.shapes) if self.base is not None else {}
        shapes = {name: self.base.shapes[name] for name in names} if self.base is not None else None
        inverse = {engine_name: name for name, engine_name in names.items()}
        aliases = {
            pair.module: inverse[name]
            for pair in adapter.modules
            if (name := self.homes.engine_name(pair)) is not None and name in inverse
        }
        record = LoadRecord(self.writer, load, adapter, expect(adapter, shapes, aliases), dtype)
        active = ActiveLoad.of(record, self.homes)
        record.announce({key: home.engine_as for key, home in active.homes.items()})
        self.writer.event("read", f"{request.lora_name} from {path}", tensors=len(adapter.weights.tensors))
        return active

    def was_read(self, adapter_id: int, active: ActiveLoad, lora: Any, seconds: float) -> None:
        """The loader has finished, and `read` is judged. An earlier load with the same id has ended."""
        self._retire(adapter_id)
        self.loads[adapter_id] = active
        self.writer.event("read", f"{len(lora.loras)} pairs accepted", seconds=seconds)

    def refused(self, active: ActiveLoad, error: BaseException, stage: str) -> None:
        message = " ".join(str(error).split()) or f"{type(error).__name__} without a message"
        self.writer.event("refused", f"while vLLM was {stage}: {message}")
        active.record.refused(message)

    def activated(self, adapter_id: int, slot: int, seconds: float, logged: list[str]) -> None:
        """The slot is filled: compare it with the file, and record the load's layers from now on."""
        active = self.loads[adapter_id]
        active.slot = slot
        active.record.activated(slot, logged)
        self.writer.event("activate", f"{active.record.load.name} is in slot {slot}", seconds=seconds)
        active.judge_slots("at activation")
        self.strict.in_slot(active)
        self.publish()
        if self.keep != "events" and not self.not_recorded:
            self.steps.activated(adapter_id, active)

    def evicted(self, adapter_id: int) -> None:
        """The adapter loses its slot: judge it now, as its contents will be replaced."""
        active = self.loads[adapter_id]
        if active.slot is not None:
            self.writer.event("evict", f"{active.record.load.name} removed from slot {active.slot}")
            active.judge_slots("when it was evicted")
            active.slot = None
            self.steps.deactivated(adapter_id)

    def stepping(self, runner: Any, scheduler_output: Any) -> Any:
        """The context manager around one `execute_model`."""
        if self._outputs_of:
            with self.guard("the recorded modules"):
                self._begin_watching(runner)
        if self.requested.pending:
            with self.guard("another level"):
                self._switch(self.requested.taken())
        if self.broken or self.not_recorded or self.keep == "events":
            return nullcontext()
        return self.steps.stepping(runner, scheduler_output, self.writer)

    def _begin_watching(self, runner: Any) -> None:
        """The first step of a model without LoRA layers, which the probe has not seen before."""
        names, self._outputs_of = self._outputs_of, []
        self.not_recorded = why_not_recordable(self.worker.vllm_config, runner)
        self.writer.describe(not_recorded=self.not_recorded)
        if self.not_recorded is None:
            count = self.steps.watch(model_of(runner), names)
            self.writer.event("watch", f"recording the outputs of {count} of {len(names)} modules")

    def _switch(self, keep: Level) -> None:
        """Record at another level from this step on: rows of loads that are in slots follow, or all hooks are gone."""
        self.steps.close()
        # A segment has rows of one level.
        self.writer.flush()
        self.keep, self.steps = keep, Steps(keep, self.guard, self._sketching)
        in_slots = {number: active for number, active in self.loads.items() if active.slot is not None}
        if keep != "events" and not self.not_recorded:
            for number, active in in_slots.items():
                self.steps.activated(number, active)
        modules = len(self.steps.capture.columns)
        self.writer.event("attach", f"recording {keep}: {modules} modules of {len(in_slots)} loads", keep=keep)

    def _each_second(self) -> None:
        """In a thread of its own, also while the engine is idle."""
        self.requested.poll()
        self.publish()

    def publish(self) -> None:
        """Bring the metrics up to date."""
        if self.metrics is not None:
            self.metrics.publish([active.record for active in list(self.loads.values())])

    def finish(self) -> None:
        """Judge the slots again, write `applied` and `agrees`, and close the recording. May be called again."""
        if self._watcher is not None:
            self._watcher.close()
        if self._writer is None:
            return
        with self.guard("the end of the run"):
            for adapter_id in list(self.loads):
                self._retire(adapter_id)
        self.loads = {}
        self.steps.close()
        with self.guard("closing"):
            self.writer.close()
        self._writer = None

    def _retire(self, adapter_id: int) -> None:
        """Write the last stations of a load that ends."""
        active = self.loads.pop(adapter_id, None)
        if active is None:
            return
        if active.slot is not None:
            active.judge_slots("when the run ended")
        if not active.record.load.refused:
            active.record.finish(lambda key: self._why_unmeasured(active, key))
        self.steps.deactivated(adapter_id)

    def _why_unmeasured(self, active: ActiveLoad, key: Key) -> str | None:
        if self.keep == "events":
            return "contributions were not recorded (--keep events)"
        if self.broken:
            return "the probe failed and stopped (see the load timeline)"
        if self.not_recorded:
            return f"contributions not recorded: {self.not_recorded}"
        if key not in active.homes or not active.homes[key].recordable:
            return "this kind of layer is applied but not captured yet (embeddings, lm_head, experts)"
        if key in self.steps.capture.bypassed:
            return "this layer applies LoRA in a way that is not captured yet (fully sharded, dual stream)"
        if key not in self.steps.capture.columns:
            return "the adapter never got a slot"
        return None


def _requested(folder: Path) -> RunSpec | None:
    """The request of the run that this trace belongs to; None for a user's own vLLM."""
    path = folder / "run.json"
    return msgspec.json.decode(path.read_bytes(), type=Run).spec if path.exists() else None


def level_of(folder: Path) -> Level:
    """The level of a recording: that of run.json, or of the environment for a user's own vLLM.

    Raises:
        ProbeError: the level in the environment is unknown.
    """
    if (spec := _requested(folder)) is not None:
        return spec.keep
    level = os.environ.get(KEEP, "norms")
    if level not in LEVELS:
        raise ProbeError(f"unknown level `{level}` in {KEEP}", f"use one of: {', '.join(LEVELS)}")
    return level
