"""The rows of every step of the model runner, while adapters are loaded.

In: the runner's `execute_model`, and the active loads, or the recorded modules of a model without LoRA layers. Out:
rows for the trace, counts for `applied`, samples for `agrees`. A step is open from the call of the model to the end of
`execute_model`; warm-up and dummy runs do not open one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from lora_probe.engines.sampler import Sampler
from lora_probe.errors import ProbeError
from lora_probe.names import Key
from lora_probe.recording import DECODE, PREFILL, Floats, Level, Placed, TraceWriter
from lora_probe.recording.rows import kept
from lora_probe_vllm.capture import Capture, Step, stack
from lora_probe_vllm.loads import ActiveLoad, SlotContents
from lora_probe_vllm.plain import locate
from lora_probe_vllm.rows import rows_of
from lora_probe_vllm.runners import eager_step
from lora_probe_vllm.seams import token_slots
from lora_probe_vllm.unobserved import Unobserved

SAME = 0.05
"""The largest relative difference between two norms of a contribution from the same adapter."""


class Steps:
    """Records steps of the active loads, until `close`."""

    def __init__(
        self, keep: Level, guard: Callable[[str], AbstractContextManager[None]], sketching: bool = False
    ) -> None:
        self.guard = guard
        self.capture = Capture(keep, guard, sketching)
        self.unobserved = Unobserved()
        self.prepared: Any = None
        """The batch of the current step on the V2 runner, which returns it from `prepare_inputs`; None on V1."""
        self.sampler = Sampler()
        self.loads: dict[int, ActiveLoad] = {}
        self._contents: dict[int, SlotContents] = {}
        self._grams: dict[int, Any] = {}
        self._placed: dict[int, Placed] = {}

    def activated(self, adapter_id: int, load: ActiveLoad) -> None:
        """Record the layers of a load from now on."""
        self.loads[adapter_id] = load
        touched = [key for key, home in load.homes.items() if home.recordable and not load.record.ended(key)]
        for key in touched:
            self.capture.watch(key, load.homes[key].layer, load.homes[key].slice)
        self._contents[adapter_id] = load.contents(touched)
        self._arrange()

    def watch(self, model: Any, names: list[str]) -> int:
        """From now on, record the outputs of modules of a model without LoRA layers. Returns how many it has."""
        parts = locate(model, names)
        for name, part in parts.items():
            self.capture.watch_output((name, "weight", None), part.layer, part.slice, part.widths)
        return len(parts)

    def deactivated(self, adapter_id: int) -> None:
        """The load no longer has a slot."""
        self.loads.pop(adapter_id, None)
        self._contents.pop(adapter_id, None)
        self._arrange()

    def close(self) -> None:
        """Remove every hook and stand-in."""
        self.capture.close()
        self.loads, self._contents, self._grams, self._placed = {}, {}, {}, {}
        self.sampler = Sampler()

    def _arrange(self) -> None:
        """Collect the weights of each active load at every column, after loads and columns have changed."""
        keys = tuple(self.capture.columns)
        self._grams, self._placed = {}, {}
        for adapter, load in self.loads.items():
            gram = self._contents[adapter].stacked(keys)
            if gram is not None and load.slot is not None:
                self._grams[load.slot] = gram
            wanted = gram if kept("shrink", self.capture.keep) else None
            self._placed[load.number] = self._contents[adapter].placed(keys, wanted)

    @contextmanager
    def stepping(
        self, runner: Any, scheduler_output: Any, writer: TraceWriter, eager: str | None = None
    ) -> Iterator[None]:
        """One `execute_model`. `eager` is the kind of runner if this step of a compiled engine is to be run eager."""
        with (
            self.capture.observing(),
            eager_step(runner, eager) if eager is not None else nullcontext(),
            self.capture.stepping(runner.model, lambda: self._begin(runner, scheduler_output)),
        ):
            try:
                yield
            finally:
                if (step := self.capture.step) is not None:
                    with self.guard("the end of a step"):
                        self._finish(step, writer)

    @contextmanager
    def passing(self, runner: Any, scheduler_output: Any, writer: TraceWriter) -> Iterator[None]:
        """One `execute_model` of a compiled engine that is not observed: its rows are counted."""
        yield
        with self.guard("a step that is not observed"):
            homes = next((load.homes for load in self.loads.values() if load.homes), None)
            if homes is None:
                return
            rows = rows_of(runner, scheduler_output, self.prepared)
            layer = next(iter(homes.values())).layer
            table = token_slots(layer.punica_wrapper, len(rows))
            slots = {adapter: (load.number, load.slot) for adapter, load in self.loads.items() if load.slot is not None}
            self.unobserved.add(rows, slots, table)
            if self.unobserved.due:
                self.record_unobserved(writer)

    def record_unobserved(self, writer: TraceWriter) -> None:
        """Write how many rows of each load were not observed, if that has changed."""
        for load, passed in self.unobserved.take().items():
            writer.event("graphs", passed.text, load=load, rows=passed.rows, wrong=passed.wrong)

    def _begin(self, runner: Any, scheduler_output: Any) -> Step:
        rows = rows_of(runner, scheduler_output, self.prepared)
        ends = zip(rows.positions, rows.prompt_lengths, strict=True)
        phases = [DECODE if at >= end else PREFILL for at, end in ends]
        sampled = [number for number in self.sampler.pick(rows.requests, phases) if rows.lora[number]]
        return Step(rows, phases, sampled, mixed=0 in rows.lora)

    def _finish(self, step: Step, writer: TraceWriter) -> None:
        keys = tuple(self.capture.columns)
        stacked = stack(step, keys, self._grams)
        for adapter, load in self.loads.items():
            self._count(adapter, load, step, stacked.delta_norm)
            self._sample(adapter, load, step)
            if step.sampled:
                load.record.so_far()
        numbers = {adapter: load.number for adapter, load in self.loads.items()}
        loads = [numbers.get(adapter, -1) for adapter in step.rows.lora]
        placed = {load: self._placed[load] for load in dict.fromkeys(loads) if load >= 0}
        writer.rows(self.capture.rows(step, loads, placed, stacked))

    def _count(self, adapter: int, load: ActiveLoad, step: Step, norms: Floats) -> None:
        """Count the rows that ran with the slot of their adapter, and the rows that should not have."""
        requested = [number for number, lora in enumerate(step.rows.lora) if lora == adapter]
        if step.slots is None:
            load.record.ran(len(requested), (), 0, {})
            return
        slots = step.slots.tolist()
        applied = sum(slots[number] == load.slot for number in requested)
        ran = [key for key in self.capture.columns if key in step.shrink and key in load.pairs]
        gram = self._grams.get(load.slot) if load.slot is not None else None
        contaminated = contaminated_rows(step, tuple(self.capture.columns), gram, norms)
        of_load = {key: rows for key, rows in contaminated.items() if key in load.pairs}
        load.record.ran(len(requested), ran, applied, of_load)

    def _sample(self, adapter: int, load: ActiveLoad, step: Step) -> None:
        rows = [number for number, row in enumerate(step.sampled) if step.rows.lora[row] == adapter]
        if not rows:
            return
        for key, (x, delta) in step.samples.items():
            if key not in load.homes:
                continue
            try:
                expected = load.placement(key)
            except ProbeError:
                # A large adapter's file is gone: `agrees` is not measured from here on.
                return
            if expected is not None:
                inputs, written = (tensor[rows].float().cpu().numpy() for tensor in (x, delta))
                load.record.sample(key, inputs, written, expected.a, expected.b, expected.scaling)


def contaminated_rows(step: Step, keys: tuple[Key, ...], gram: Any, norms: Floats) -> dict[Key, int]:
    """How many rows without an adapter got a load's contribution at each of `keys`: those where the norm that the
    kernel wrote (`norms: [rows, modules]`) is the norm that the row would have with the load's G. `gram: [modules, r,
    r]`."""
    plain = [number for number, lora in enumerate(step.rows.lora) if lora == 0]
    if not plain or gram is None or not (norms[plain] > 0).any():
        return {}
    contaminated = {}
    for index, key in enumerate(keys):
        if key not in step.shrink:
            continue
        written, shrink = norms[plain, index], step.shrink[key][plain]
        own = ((shrink @ gram[index]) * shrink).sum(-1).clamp(min=0).sqrt().cpu().numpy()
        if rows := int(((written > 0) & (np.abs(own - written) <= SAME * written)).sum()):
            contaminated[key] = rows
    return contaminated
