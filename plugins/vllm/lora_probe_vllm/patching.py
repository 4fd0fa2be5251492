"""The patches that let a `Probe` observe vLLM. They are installed in one place and removed together.

In: the folder of the trace. Out: `Patches`; closing them restores vLLM. Each replacement calls the original exactly
once with the same arguments, and returns its result.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from lora_probe.errors import ProbeError
from lora_probe.recording import Level
from lora_probe_vllm import STRICT, TRACE, switched_on
from lora_probe_vllm.mixing import MixedSlot
from lora_probe_vllm.observing import Find
from lora_probe_vllm.patching_loads import patch_loads
from lora_probe_vllm.patching_strict import patch_strict
from lora_probe_vllm.rows import is_warm_up
from lora_probe_vllm.runners import supported
from lora_probe_vllm.sampling import sample_every
from lora_probe_vllm.seams import Patches, before_shutdown, seams
from lora_probe_vllm.worker import Probe, bound_of, level_of

_armed: Patches | None = None


def arm() -> None:
    """Install the probe's patches in this process, once. The worker that is built next will record."""
    global _armed
    if _armed is None:
        folder = Path(os.environ[TRACE])
        # A level that does not exist, or a bound that is not a number, is reported before a worker is built.
        level_of(folder)
        bound_of(folder)
        sample_every()
        _armed = install(folder)


def disarm() -> None:
    """Remove every patch."""
    global _armed
    if _armed is not None:
        _armed.close()
        _armed = None


def install(folder: Path) -> Patches:
    """Wrap the methods listed in METHODS in `seams.py`. Each worker built from now on has a probe.

    Raises:
        SeamMoved: this vLLM does not have one of the names.
    """
    patches = Patches()
    probes: dict[int, Probe] = {}

    def recording() -> Probe | None:
        """The recording probe. A process has one worker, unless a script starts several engines in turn."""
        return next((p for p in probes.values() if p.recording), None)

    def probe_of(runner: Any) -> Probe | None:
        return next((p for p in probes.values() if getattr(p.worker, "model_runner", None) is runner), None)

    def probe_of_manager(manager: Any) -> Probe | None:
        owner = [p for p in probes.values() if p.homes is not None and p.homes.manager is manager]
        # While the manager is being created, no probe has it yet.
        return owner[0] if owner else recording()

    def worker_init(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            try:
                probe = probes[id(self)] = Probe(self, folder)
                before_shutdown(patches, self, probe.shutting_down)
            # Any exception: the engine must not fail because of it. `trace` reports that no worker has the probe.
            except Exception as error:
                logging.getLogger("vllm.lora_probe").error("lora-probe cannot record into %s: %r", folder, error)

        return __init__

    patches.wrap(seams.worker, "__init__", worker_init)
    patches.add(seams.worker, "lora_probe_begin", _begin(probes))
    patches.add(seams.worker, "lora_probe_finish", _finish(probes))
    patches.add(seams.worker, "lora_probe_mix", _mix(probes))
    _patch_model(patches, probe_of, probe_of_manager)
    _patch_steps(patches, probe_of)
    patch_loads(patches, probe_of_manager, recording)
    if switched_on(STRICT):
        patch_strict(patches, probe_of)
    return patches


def _begin(probes: dict[int, Probe]) -> Callable[..., str]:
    def lora_probe_begin(self: Any, folder: str, keep: Level | None = None) -> str:
        """RPC: close the open recording and begin another one in `folder`. Without a run.json there, `keep` is its
        level."""
        probe = probes[id(self)]
        probe.open(Path(folder), keep)
        return probe.name

    return lora_probe_begin


def _finish(probes: dict[int, Probe]) -> Callable[..., bool]:
    def lora_probe_finish(self: Any) -> bool:
        """RPC: write the last stations and close. Returns whether there was a recording to close."""
        probe = probes.get(id(self))
        if probe is None or not probe.recording:
            return False
        probe.finish()
        return True

    return lora_probe_finish


def _mix(probes: dict[int, Probe]) -> Callable[..., str]:
    mixed: dict[int, MixedSlot] = {}

    def lora_probe_mix(self: Any, changed: list[str], settings: dict[str, Any] | None = None) -> str:
        """RPC: give these modules of the reference's slot the weights of the candidate, and all others those of the
        reference. The first call has the arguments of `MixedSlot`. Returns why that is impossible, or nothing."""
        if settings is not None:
            try:
                mixed[id(self)] = MixedSlot(probes[id(self)].loads, **settings)
            except (ValueError, ProbeError) as error:
                return str(error)
        mixed[id(self)].mix(changed)
        return ""

    return lora_probe_mix


def _patch_model(patches: Patches, probe_of: Find, probe_of_manager: Find) -> None:
    def load_lora_model(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            model = original(self, *args, **kwargs)
            probe = probe_of(self) or probe_of_manager(None)
            if probe is not None and probe.recording:
                with probe.guard("the LoRA manager"):
                    probe.model_loaded(self, round(time.perf_counter() - started, 6))
            return model

        return wrapper

    def register_module(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, name, module, *args, **kwargs)
            probe = probe_of_manager(self)
            if probe is not None and probe.recording:
                with probe.guard("a replaced layer"):
                    probe.wrapped(name, module)
            return result

        return wrapper

    patches.wrap(seams.runner_mixin, "load_lora_model", load_lora_model)
    patches.wrap(seams.manager, "register_module", register_module)


def _patch_steps(patches: Patches, probe_of: Find) -> None:
    """Record the steps of each runner that this vLLM has."""

    def execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of(self)
            # The V2 runner calls itself for profiling, warm-up and idle steps.
            dummy = kwargs.get("dummy_run", False) or is_warm_up(scheduler_output)
            if probe is None or not probe.recording or dummy:
                return original(self, scheduler_output, *args, **kwargs)
            with probe.stepping(self, scheduler_output):
                return original(self, scheduler_output, *args, **kwargs)

        return wrapper

    def prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            batch = original(self, *args, **kwargs)
            probe = probe_of(self)
            if probe is not None and probe.recording:
                probe.steps.prepared = batch
            return batch

        return wrapper

    def sample_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            probe = probe_of(self)
            if probe is None or not probe.recording:
                return original(self, *args, **kwargs)
            with probe.steps.choosing_tokens():
                return original(self, *args, **kwargs)

        return wrapper

    classes, _ = supported()
    for runner in classes.values():
        patches.wrap(runner, "execute_model", execute_model)
    if "V2" in classes:
        patches.wrap(classes["V2"], "prepare_inputs", prepare_inputs)
        patches.wrap(classes["V2"], "sample_tokens", sample_tokens)
