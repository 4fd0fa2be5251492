"""The probe in a vLLM worker: the load timeline, and the stations of every load from `stored` to `agrees`.

In: what the patches observe, from the worker's construction on. Out: the folder `vllm-rank-N/` of a trace. A failure of
the probe never fails a request: it is recorded, and the probe stops.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec

from lora_probe.base import Base, open_base
from lora_probe.errors import ProbeError
from lora_probe.names import Key
from lora_probe.precision import coarser
from lora_probe.recording import LEVELS, SCHEMA, Level, Process, Run, RunSpec, TraceWriter
from lora_probe.recording.runs import begin_run
from lora_probe_vllm import KEEP, MAX_MB, METRICS, switched_on
from lora_probe_vllm.control import RequestedLevel
from lora_probe_vllm.loading import Loading
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.metrics import Metrics
from lora_probe_vllm.runners import Running, eager_step, running
from lora_probe_vllm.sampling import MAX_TOKENS, ChosenSteps, sample_every
from lora_probe_vllm.seams import engine_settings, launch_id, manager_of, model_of, replica_of, vllm_version
from lora_probe_vllm.slots import Homes
from lora_probe_vllm.steps import Steps
from lora_probe_vllm.strict import Strict
from lora_probe_vllm.watcher import Watcher

_log = logging.getLogger("vllm.lora_probe")

MOST_MB = 10_000_000
"""10 TB: a larger number is a typing error."""


class Guard:
    """A block of the probe's own code whose exceptions are handed to `failed`: a request must not fail because of them.
    It is entered several times for each layer of a step, so it is not a generator."""

    __slots__ = ("_failed", "_stage")

    def __init__(self, stage: str, failed: Callable[[str, Exception], None]) -> None:
        self._stage, self._failed = stage, failed

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self._failed(self._stage, error)
        return True


class Probe:
    """The state of the probe in one worker, from the worker's construction until `finish`."""

    def __init__(self, worker: Any, folder: Path) -> None:
        self.worker = worker
        self.rank, self.replica = int(worker.rank), replica_of(worker.vllm_config)
        """Which worker of its engine, and which engine among those that serve the same model (data parallelism)."""
        self.homes: Homes | None = None
        self.base: Base | None = None
        self.not_recorded: str | None = None
        self.running: Running | None = None
        self.broken = False
        self.strict = Strict(self.guard)
        self.metrics = Metrics(self.rank, self.replica) if switched_on(METRICS) else None
        self._every = sample_every()
        self._chosen: ChosenSteps | None = None
        self._generations: dict[int, int] = {}
        self._writer: TraceWriter | None = None
        self._watcher: Watcher | None = None
        self._recordings = 0
        self._outputs_of: list[str] = []
        self.open(folder)
        # A user's own script ends without a call of `finish`.
        atexit.register(self.finish)

    @property
    def name(self) -> str:
        """The name of the worker's folder in a trace."""
        engine = f"dp-{self.replica}-" if self.replica else ""
        return f"vllm-{engine}rank-{self.rank}"

    @property
    def writer(self) -> TraceWriter:
        assert self._writer is not None
        return self._writer

    @property
    def loads(self) -> dict[int, ActiveLoad]:
        """The loads of the adapters that the engine has, by their ids in the engine."""
        return self.loading.loads

    @property
    def recording(self) -> bool:
        return self._writer is not None

    def open(self, folder: Path, keep: Level | None = None) -> None:
        """Begin to write into `folder`, as a new run inside it if something was recorded there before.

        `keep` is the level of detail if there is no run.json; the default is that of the environment.
        """
        self.finish()
        config = self.worker.vllm_config
        # All ranks of an engine begin their recordings in the same order, so they agree on the launch.
        launch, self._recordings = f"{launch_id(config)} {self._recordings}", self._recordings + 1
        first, folder = folder, begin_run(folder, self.name, launch)
        if folder != first:
            _log.info("%s has recordings of earlier runs; this one goes to %s", first, folder)
        spec = _requested(folder)
        self.keep = self._joinable(keep if keep is not None and spec is None else level_of(folder))
        self.broken = False
        self._outputs_of = list(spec.watch) if spec is not None else []
        loads: dict[int, ActiveLoad] = {}
        self.steps = Steps(self.keep, self.guard, loads, sketching=spec is not None and spec.score)
        self._choose_steps(of_a_run=spec is not None)
        settings = engine_settings(config)
        if self.running is not None:
            settings |= self.running.settings(self._every)
        process = Process(
            schema=SCHEMA,
            role="worker",
            engine="vllm",
            rank=self.rank,
            replica=self.replica,
            launch=launch,
            pid=os.getpid(),
            versions={"vllm": vllm_version()},
            keep=self.keep,
            device=str(config.device_config.device_type),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            lora_dtype=settings.get("lora_dtype", ""),
            settings=settings,
            not_recorded=self.not_recorded,
        )
        self._writer = TraceWriter(folder / self.name, process, bound_of(folder), _log.warning)
        self._writer.flush_by_time(self.guard)
        self.loading = Loading(self._writer, self.steps, self._generations, self, loads)
        self.requested = RequestedLevel(self._writer)
        self._watcher = Watcher(self._each_second)
        if self.homes is not None:
            for name, layer in self.homes.manager.modules.items():
                self.wrapped(name, layer)
            self._record_manager("replaced before this recording began")

    def _joinable(self, keep: Level) -> Level:
        """The level that is recorded. The contribution of a layer whose input is sharded is a norm of a sum over the
        ranks: it follows from x·Aᵀ of each, and not from their norms."""
        ranks = self.worker.vllm_config.parallel_config.tensor_parallel_size
        return "shrink" if keep == "norms" and ranks > 1 else keep

    def guard(self, stage: str) -> Guard:
        """Record a failure of the probe instead of raising it into vLLM."""
        return Guard(stage, self._failed)

    def _failed(self, stage: str, error: Exception) -> None:
        self.broken = True
        self.steps.capture.abandon()
        text = f"the probe failed at `{stage}` and stopped: {error!r}"
        _log.error(text)
        try:
            if self._writer is not None:
                self._writer.event("probe", text)
        # Any exception here as well: the reason is in the log.
        except Exception as failure:
            _log.error("the probe could not record this either: %r", failure)

    def model_loaded(self, runner: Any, seconds: float) -> None:
        """The LoRA manager was created, and the model's layers were replaced in place."""
        self.homes = Homes(manager_of(runner))
        config = self.worker.vllm_config
        self._recognise(runner)
        self._record_manager("replaced", seconds)
        try:
            self.base = open_base(config.model_config.model)
        except ProbeError as error:
            self.writer.event("base", f"the files of the base model cannot be read here: {error.message}")

    def _recognise(self, runner: Any) -> None:
        """The model runner of this engine, and whether its steps can be recorded."""
        self.running = running(self.worker.vllm_config, runner)
        self.not_recorded = self.running.why_not(sampling=self._every is not None)
        self._choose_steps(self._of_a_run)
        settings = self.writer.process.settings | self.running.settings(self._every)
        self.writer.describe(not_recorded=self.not_recorded, settings=settings)

    def _choose_steps(self, of_a_run: bool) -> None:
        """Begin to choose the steps that are observed. A run that `trace` started observes all, if it can."""
        self._of_a_run = of_a_run
        compiled = self.running is not None and self.running.compiled is not None
        every = self._every if compiled or not of_a_run else None
        self._chosen = ChosenSteps(every) if every is not None else None
        self.steps.capture.transient = self._chosen is not None
        self.steps.unobserved.compiled = compiled

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

    def stepping(self, runner: Any, scheduler_output: Any) -> Any:
        """The context manager around one `execute_model`."""
        if self._outputs_of:
            with self.guard("the recorded modules"):
                self._begin_watching(runner)
        if self.requested.pending:
            with self.guard("another level"):
                self._switch(self.requested.taken())
        recorded = not self.broken and self.records_rows
        if self._chosen is None:
            return self.steps.stepping(runner, scheduler_output, self.writer) if recorded else nullcontext()
        return self._stepping_sampled(runner, scheduler_output, self._chosen, recorded)

    def _stepping_sampled(self, runner: Any, scheduler_output: Any, chosen: ChosenSteps, recorded: bool) -> Any:
        """One step of an engine of which some steps are observed, eager if it compiles or replays; others are counted.

        A rank whose probe has failed still runs the chosen steps eager: the ranks of an engine must not differ.
        """
        assert self.running is not None
        is_chosen = chosen.choose(scheduler_output)
        eager = self.running.runner if is_chosen and self.running.compiled is not None else None
        if not recorded:
            alone = self.worker.vllm_config.parallel_config.world_size == 1
            return nullcontext() if eager is None or alone else eager_step(runner, eager)
        if not is_chosen:
            return self.steps.passing(runner, scheduler_output, self.writer)
        return self.steps.stepping(runner, scheduler_output, self.writer, eager)

    def _begin_watching(self, runner: Any) -> None:
        """The first step of a model without LoRA layers, which the probe has not seen before."""
        names, self._outputs_of = self._outputs_of, []
        self._recognise(runner)
        if self.not_recorded is None:
            count = self.steps.watch(model_of(runner), names)
            self.writer.event("watch", f"recording the outputs of {count} of {len(names)} modules")

    def shutting_down(self) -> None:
        """The worker is about to end, and may be killed at any time: what was recorded is written first."""
        if self._writer is not None:
            with self.guard("the worker's end"):
                self._writer.flush()
            self.finish()

    def _switch(self, keep: Level) -> None:
        """Record at another level from this step on: rows of loads that are in slots follow, or all hooks are gone."""
        # A segment has rows of one level.
        self.writer.flush()
        self.keep = keep = self._joinable(keep)
        count = self.steps.switch(keep, record=self.records_rows)
        modules = len(self.steps.capture.columns)
        self.writer.event("attach", f"recording {keep}: {modules} modules of {count} loads", keep=keep)

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
            self.steps.record_unobserved(self.writer)
            if self._chosen is not None and self._chosen.too_long:
                count, limit = self._chosen.too_long, MAX_TOKENS
                self.writer.event("graphs", f"{count} steps had more than {limit} tokens and were not run eager")
            self.loading.finish()
        self.loading.loads.clear()
        with self.guard("removing the hooks"):
            self.steps.close()
        with self.guard("closing"):
            self.writer.close()
        self._writer = None

    @property
    def dtype(self) -> str:
        """The coarsest dtype in which LoRA layers compute."""
        assert self.homes is not None
        dtypes = (self.worker.vllm_config.model_config.dtype, self.homes.manager.lora_config.lora_dtype)
        return coarser(*(str(value).removeprefix("torch.") for value in dtypes))

    @property
    def records_rows(self) -> bool:
        """Whether the rows of steps are recorded."""
        return self.keep != "events" and not self.not_recorded

    def why_unmeasured(self, active: ActiveLoad, key: Key) -> str | None:
        if self.keep == "events" and not active.record.has_run(key):
            return "contributions were not recorded (--keep events)"
        if self.broken:
            return "the probe failed and stopped (see the load timeline)"
        if self.not_recorded:
            return f"contributions not recorded: {self.not_recorded}"
        has_run, home = active.record.has_run(key), active.homes.get(key)
        passed = self.steps.unobserved.passed.get(active.number)
        if passed is not None and not has_run:
            return passed.text
        if home is not None and home.routes:
            return None if has_run else self.steps.capture.why_no_experts(home.layer)
        if home is not None and home.samples:
            return None if has_run else "its logits were computed outside of a recorded step"
        if home is None or not home.recordable:
            kind = type(home.layer).__name__ if home is not None else "this kind of layer"
            return f"{kind} is applied, but its contribution is not captured yet"
        if home.embeds and not has_run:
            return "the embedding ran outside of the model's forward pass"
        if key in self.steps.capture.bypassed:
            return "this layer applies LoRA in a way that is not captured yet (dual stream)"
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


def bound_of(folder: Path) -> int | None:
    """How many bytes of rows a worker keeps in its folder; None for a run with a run.json, which ends by itself.

    Raises:
        ProbeError: the bound in the environment is not a positive whole number.
    """
    if _requested(folder) is not None:
        return None
    text = os.environ.get(MAX_MB, "512")
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= MOST_MB):
        hint = f"use a whole number of megabytes from 1 to {MOST_MB:,}, such as {MAX_MB}=512"
        raise ProbeError(f"invalid bound `{text}` in {MAX_MB}", hint)
    return int(text) * 2**20
