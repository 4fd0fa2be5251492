"""The rows of every step of the model runner, while adapters are loaded.

In: the runner's `execute_model`, and the active loads, or the watched modules of a model that has no LoRA layers. Out:
rows for the trace, tallies for `applied`, samples for `agrees`. A step is open from the call of the model to the end of
`execute_model`; warm-up and dummy runs open none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from lora_probe.engines.account import Sampler
from lora_probe.errors import ProbeError
from lora_probe.names import Key
from lora_probe.recording import DECODE, PREFILL, Floats, Level, TraceWriter
from lora_probe_vllm.capture import Capture, Step, stack
from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.plain import locate
from lora_probe_vllm.seams import v1_rows

SAME = 0.05
"""Two norms of a contribution this close are of the same adapter."""


class Steps:
    """Records steps for the loads that it is told of, until `close`."""

    def __init__(
        self, keep: Level, guard: Callable[[str], AbstractContextManager[None]], sketching: bool = False
    ) -> None:
        self.guard = guard
        self.capture = Capture(keep, guard, sketching)
        self.sampler = Sampler()
        self.loads: dict[int, ActiveLoad] = {}
        self._grams: dict[int, Any] = {}
        self._last: ActiveLoad | None = None

    def activated(self, adapter_id: int, load: ActiveLoad) -> None:
        """Record the touched layers from now on."""
        self.loads[adapter_id] = load
        for key, home in load.homes.items():
            if key not in load.account.gone and home.recordable:
                self.capture.watch(key, home.layer, home.slice)
        self._take_grams()

    def watch(self, model: Any, names: list[str]) -> int:
        """Record what modules of a model without LoRA layers give, from now on. How many of them it has."""
        found = locate(model, names)
        for name, part in found.items():
            self.capture.watch_output((name, "weight", None), part.layer, part.slice, part.widths)
        return len(found)

    def deactivated(self, adapter_id: int) -> None:
        self.loads.pop(adapter_id, None)
        used = {load.slot for load in self.loads.values()}
        self._grams = {slot: gram for slot, gram in self._grams.items() if slot in used}
        if self._last not in self.loads.values():
            self._last = None

    def close(self) -> None:
        """Take out every hook and stand-in."""
        self.capture.close()
        self.loads, self._grams, self._last = {}, {}, None
        self.sampler = Sampler()

    def _take_grams(self) -> None:
        """G of every column for each slot in use; columns may have been added, and slots filled anew."""
        keys = tuple(self.capture.columns)
        active = [load for load in self.loads.values() if load.slot is not None]
        found = {load.slot: load.grams(keys) for load in active}
        self._grams = {slot: gram for slot, gram in found.items() if slot is not None and gram is not None}

    @contextmanager
    def stepping(self, runner: Any, scheduler_output: Any, writer: TraceWriter) -> Iterator[None]:
        """One `execute_model`. It may load its adapters itself, so layers are looked at when the model is called."""

        def before(model: Any, args: Any, kwargs: Any) -> None:
            if not self.capture.columns:
                return
            with self.guard("the start of a step"):
                rows = v1_rows(runner, scheduler_output)
                ends = zip(rows.positions, rows.prompt_lengths, strict=True)
                phases = [DECODE if at >= end else PREFILL for at, end in ends]
                sampled = [number for number in self.sampler.pick(rows.requests, phases) if rows.lora[number]]
                self.capture.step = Step(rows, phases, sampled, mixed=0 in rows.lora)

        handle = runner.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            step, self.capture.step = self.capture.step, None
            if step is not None:
                with self.guard("the end of a step"):
                    self._finish(step, writer)

    def _finish(self, step: Step, writer: TraceWriter) -> None:
        keys = tuple(self.capture.columns)
        stacked = stack(step, keys, self._grams)
        used = [load for adapter, load in self.loads.items() if adapter in step.rows.adapters]
        for adapter, load in self.loads.items():
            self._tally(adapter, load, step, stacked.delta_norm)
            self._sample(adapter, load, step)
            if step.sampled:
                load.account.so_far()
        if used:
            # G and digests describe rows of one load; where a step mixes loads they say nothing.
            self._last = used[0] if len(used) == 1 else None
        last = self._last
        placed = tuple(last.digests.get(key, "") if last else "" for key in keys)
        gram = self._grams.get(last.slot) if last is not None and last.slot is not None else None
        numbers = {adapter: load.number for adapter, load in self.loads.items()}
        loads = [numbers.get(adapter, -1) for adapter in step.rows.lora]
        writer.rows(self.capture.rows(step, loads, gram, placed, stacked))

    def _tally(self, adapter: int, load: ActiveLoad, step: Step, norms: Floats) -> None:
        """Which rows ran with the slot of the adapter that they asked for, and which should not have."""
        mine = [number for number, lora in enumerate(step.rows.lora) if lora == adapter]
        load.account.asked += len(mine)
        if step.slots is None:
            return
        slots = step.slots.tolist()
        right = sum(slots[number] == load.slot for number in mine)
        ran = [key for key in self.capture.columns if key in step.shrink and key in load.pairs]
        load.account.ran(ran, right, self._contaminated(load, step, norms))

    def _contaminated(self, load: ActiveLoad, step: Step, norms: Floats) -> dict[Key, int]:
        """Rows without an adapter that got this load's contribution: where what the kernel wrote is of the size
        that this load's slot gives to the row."""
        plain = [number for number, lora in enumerate(step.rows.lora) if lora == 0]
        gram = self._grams.get(load.slot) if load.slot is not None else None
        if not plain or gram is None or not (norms[plain] > 0).any():
            return {}
        found = {}
        for index, key in enumerate(self.capture.columns):
            if key not in load.pairs or key not in step.shrink:
                continue
            written = norms[plain, index]
            shrink = step.shrink[key][plain]
            own = ((shrink @ gram[index]) * shrink).sum(-1).clamp(min=0).sqrt().cpu().numpy()
            if rows := int(((written > 0) & (np.abs(own - written) <= SAME * written)).sum()):
                found[key] = rows
        return found

    def _sample(self, adapter: int, load: ActiveLoad, step: Step) -> None:
        rows = [number for number, row in enumerate(step.sampled) if step.rows.lora[row] == adapter]
        if not rows:
            return
        for key, (x, delta) in step.samples.items():
            if key not in load.homes:
                continue
            try:
                wanted = load.placement(key)
            except ProbeError:
                # A large adapter's file is gone: `agrees` stays unmeasured for what follows.
                return
            if wanted is not None:
                taken, written = (tensor[rows].float().cpu().numpy() for tensor in (x, delta))
                load.account.sample(key, taken, written, wanted.a, wanted.b, wanted.scaling)
