"""The rows of every step of the model runner, while adapters are loaded.

In: the runner's `execute_model`, and the active loads, or the recorded modules of a model without LoRA layers. Out:
rows for the trace, counts for `applied`, samples for `agrees`, and what went wrong for requests. A step is open from
the call of the model to the end of `execute_model`; warm-up and dummy runs do not open one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.engines.sampler import Sampler
from lora_probe.names import Key
from lora_probe.recording import Level, Placed, TraceWriter
from lora_probe.recording.rows import NO_ADAPTER, NOT_IN_ITS_SLOT, kept
from lora_probe_vllm.blocks import Author, Blocks
from lora_probe_vllm.capture import Capture, keeps_tokens
from lora_probe_vllm.experts import RoutedRows
from lora_probe_vllm.loads import ActiveLoad, SlotContents
from lora_probe_vllm.measured import Stacked, Step
from lora_probe_vllm.plain import locate
from lora_probe_vllm.rows import RowColumns, requests_of, rows_of
from lora_probe_vllm.runners import eager_step
from lora_probe_vllm.samples import Heads, compare_samples, count_heads
from lora_probe_vllm.seams import block_size_of, token_slots
from lora_probe_vllm.unobserved import Unobserved

SAME = 0.05
"""The largest relative difference between two norms of a contribution from the same adapter."""

MEASURED_STEPS = 8
"""So many steps with rows without an adapter are measured after the loads have changed, which costs a buffer as large
as every layer's output. If none of these rows got a contribution, it is enough to see that their shrink is zero."""

Bools = npt.NDArray[np.bool_]


class Steps:
    """Records steps of the active loads, until `close`. `known` are all loads that were read and not replaced, by
    vLLM's adapter id; those that have no slot are not active."""

    def __init__(
        self,
        keep: Level,
        guard: Callable[[str], AbstractContextManager[None]],
        known: Mapping[int, ActiveLoad],
        sketching: bool = False,
    ) -> None:
        self.guard, self._known = guard, known
        self.capture = Capture(keep, guard, sketching)
        self.unobserved = Unobserved(compiled=False)
        self.prepared: Any = None
        """The batch of the current step on the V2 runner, which returns it from `prepare_inputs`; None on V1."""
        self.sampler = Sampler()
        self.loads: dict[int, ActiveLoad] = {}
        self._contents: dict[int, SlotContents] = {}
        self._routed: dict[int, RoutedRows] = {}
        self._heads: dict[int, Heads] = {}
        self._grams: dict[int, Any] = {}
        self._placed: dict[int, Placed] = {}
        self._held: dict[int, ActiveLoad] = {}
        self._left: dict[int, Any] = {}
        self._authors: dict[int, Author] = {}
        self._blocks: Blocks | None = None
        self._computed: Step | None = None
        self._clean_steps = 0

    def activated(self, adapter_id: int, load: ActiveLoad) -> None:
        """Record the layers of a load from now on."""
        self.loads[adapter_id] = load
        touched = [key for key, home in load.homes.items() if home.recordable and not load.record.ended(key)]
        self._watch_whole(adapter_id, load)
        for key in touched:
            home = load.homes[key]
            shard = home.shard
            partial = shard is not None and shard.axis != "output"
            self.capture.watch(key, home.layer, home.slice, partial, home.embeds)
        self._contents[adapter_id] = load.contents(touched)
        self._arrange()

    def _watch_whole(self, adapter_id: int, load: ActiveLoad) -> None:
        """Record the layers without columns: experts and heads. Their rows are not those of the step."""
        routes: dict[int, dict[tuple[int, int], Key]] = {}
        heads: dict[int, Key] = {}
        for key, home in load.homes.items():
            if load.record.ended(key):
                continue
            if home.routes:
                of_layer = routes.setdefault(self.capture.watch_whole(home.layer, routes=True), {})
                of_layer |= {part.expert: key for part in (home.parts if home.fused else [home])}
            elif home.samples:
                heads[self.capture.watch_whole(home.layer, samples=True)] = key
        self._routed[adapter_id], self._heads[adapter_id] = RoutedRows(routes), heads
        load.record.routed([*heads.values(), *(key for keys in routes.values() for key in keys.values())], 0, 0)

    def switch(self, keep: Level, record: bool) -> int:
        """Record at another level from the next step on, or nothing without `record`. Returns how many loads have a
        slot."""
        before, self.capture = self.capture, Capture(keep, self.guard, self.capture.sketching)
        self.capture.transient = before.transient
        before.close()
        if "events" in (keep, before.keep):
            # Requests are not followed at that level.
            self._blocks = None
        self.loads, self._contents, self._routed, self._heads = {}, {}, {}, {}
        self._arrange()
        in_slots = {adapter: load for adapter, load in self._known.items() if load.slot is not None}
        if record:
            for adapter, load in in_slots.items():
                self.activated(adapter, load)
        return len(in_slots)

    def watch(self, model: Any, names: list[str]) -> int:
        """From now on, record the outputs of modules of a model without LoRA layers. Returns how many it has."""
        parts = locate(model, names)
        for name, part in parts.items():
            self.capture.watch_output((name, "weight", None), part.layer, part.slice, part.widths)
        return len(parts)

    def deactivated(self, adapter_id: int) -> None:
        """The load no longer has a slot. vLLM leaves its weights there until it fills the slot again."""
        load = self.loads.pop(adapter_id, None)
        left = [slot for slot, held in self._held.items() if held is load and slot in self._grams]
        self._left |= {slot: self._grams[slot] for slot in left}
        self._contents.pop(adapter_id, None)
        if (routed := self._routed.pop(adapter_id, None)) is not None and load is not None:
            routed.hand_over(load.record, now=True)
        self._heads.pop(adapter_id, None)
        self._arrange()

    def settle(self, adapter_id: int) -> None:
        """Count what is not in the load's record yet, before that ends."""
        if adapter_id in self._routed and adapter_id in self.loads:
            self._routed[adapter_id].hand_over(self.loads[adapter_id].record, now=True)

    def close(self) -> None:
        """Remove every hook and stand-in."""
        self.capture.close()
        for load in self._gone():
            with self.guard("the end of a load"):
                load.record.finish_requests()
        self.loads, self._contents, self._grams, self._placed, self._authors = {}, {}, {}, {}, {}
        self._held, self._left, self._routed, self._heads = {}, {}, {}, {}
        self.sampler, self._blocks = Sampler(), None

    def _arrange(self) -> None:
        """Collect the weights of each active load at every column, after loads and columns have changed."""
        self._clean_steps = 0
        keys = tuple(self.capture.columns)
        self._grams, self._placed = {}, {}
        active = {load.slot: load for load in self.loads.values() if load.slot is not None}
        self._held |= active
        self._left = {slot: gram for slot, gram in self._left.items() if slot not in active}
        self._authors = {adapter: Author(load.number, load.record.load.digest) for adapter, load in self.loads.items()}
        for adapter, load in self.loads.items():
            gram = self._contents[adapter].stacked(keys)
            if gram is not None and load.slot is not None:
                self._grams[load.slot] = gram
            wanted = gram if kept("shrink", self.capture.keep) else None
            self._placed[load.number] = self._contents[adapter].placed(keys, wanted)

    def _gone(self) -> list[ActiveLoad]:
        """The loads that have ended and whose weights are still in a slot."""
        known = {id(load) for load in self._known.values()}
        return [load for load in self._held.values() if id(load) not in known]

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
                with self.guard("the requests of a step"):
                    self._follow(runner, scheduler_output)
                if (step := self.capture.step) is not None:
                    self._computed = step if self.prepared is not None else None
                    with self.guard("the end of a step"):
                        self._finish(step, writer)
                with self.guard("the report of a step"):
                    for load in self._known.values():
                        load.record.report_if_due()
                    for load in self._gone():
                        load.record.report_requests()

    @contextmanager
    def choosing_tokens(self) -> Iterator[None]:
        """`sample_tokens` of the V2 runner: there it computes the logits of the last step, if it was observed."""
        step, self._computed = self._computed, None
        if step is None or not any(self._heads.values()):
            yield
            return
        with self.capture.reopened(step):
            yield
        with self.guard("the logits of a step"):
            for adapter, load in self.loads.items():
                count_heads(step, self._heads[adapter], adapter, load)

    @contextmanager
    def passing(self, runner: Any, scheduler_output: Any, writer: TraceWriter) -> Iterator[None]:
        """One `execute_model` that is not observed: its rows are counted."""
        yield
        with self.guard("the requests of a step"):
            self._follow(runner, scheduler_output, only_new_blocks=True)
        with self.guard("a step that is not observed"):
            homes = next((load.homes for load in self.loads.values() if load.homes), None)
            if homes is None:
                return
            lora, counts = requests_of(runner, scheduler_output, self.prepared)
            layer = next(iter(homes.values())).layer
            table = token_slots(layer.punica_wrapper, int(counts.sum()))
            slots = {adapter: (load.number, load.slot) for adapter, load in self.loads.items() if load.slot is not None}
            self.unobserved.add(lora, counts, slots, table)
            if self.unobserved.due:
                self.record_unobserved(writer)

    def record_unobserved(self, writer: TraceWriter) -> None:
        """Write how many rows of each load were not observed, if that has changed."""
        for load, passed in self.unobserved.take().items():
            writer.event("graphs", passed.text, load=load, rows=passed.rows, wrong=passed.wrong)

    def _begin(self, runner: Any, scheduler_output: Any) -> Step:
        rows = rows_of(runner, scheduler_output, self.prepared)
        lora = rows.columns.lora
        numbers = {adapter: load.number for adapter, load in self.loads.items()}
        runs = [
            (request, phase, first, count)
            for request, phase, first, count in rows.columns.runs()
            if (load := numbers.get(int(lora[first]))) is not None and self.sampler.admits(request, load)
        ]
        sampled = self.sampler.pick_runs(runs)
        unclaimed = ~self._claimed(lora)
        always = self._clean_steps < MEASURED_STEPS or self.capture.embeds
        measured = unclaimed.any() and (always or lora[unclaimed].any())
        return Step(rows, sampled, mixed=bool(measured), active=tuple(self._grams))

    def _claimed(self, lora: npt.NDArray[np.int64]) -> Bools:
        """Which rows requested an adapter that has a slot, `[rows]`."""
        claimed: Bools = np.zeros(len(lora), np.bool_)
        for adapter in self.loads:
            claimed |= lora == adapter
        return claimed

    def _follow(self, runner: Any, scheduler_output: Any, only_new_blocks: bool = False) -> None:
        """The requests of a step and their blocks, also of a step in which no layer is recorded."""
        if self._blocks is None:
            self._blocks = Blocks(block_size_of(runner), keeps_tokens())
        for request in self._blocks.step(scheduler_output, self._authors, only_new_blocks):
            if request.other_weights and request.adapter in self.loads:
                load = self.loads[request.adapter]
                load.record.cached_with_other_weights({request.id: request.other_weights})
        # An adapter that was loaded before this recording began is not known here, and may well have a slot.
        for adapter in self._known.keys() - self.loads.keys():
            self._known[adapter].record.not_in_its_slot(self._blocks.rows_of(adapter, scheduler_output))

    def _finish(self, step: Step, writer: TraceWriter) -> None:
        columns = step.rows.columns
        claimed = self._claimed(columns.lora)
        stacked = self.capture.arranged.stack(step, self._grams, claimed)
        keys = tuple(self.capture.columns)
        ran = [keys[number] for number in stacked.present]
        loads = self._loads_of(step)
        fresh = self._fresh(step)
        for adapter, load in self.loads.items():
            requested, applied = fresh & (columns.lora == adapter), fresh & (loads == load.number)
            load.record.ran(int(requested.sum()), [key for key in ran if key in load.pairs], int(applied.sum()))
            routed = self._routed[adapter]
            routed.add(step, requested, applied)
            routed.hand_over(load.record)
            count_heads(step, self._heads[adapter], adapter, load)
            compare_samples(step, routed.routes, adapter, load)
        self._blame(step, loads, stacked)
        placed = {load: self._placed[load] for load in np.unique(loads).tolist() if load >= 0}
        running = self._blocks.running if self._blocks is not None else {}
        served = {name: running[name].served for name in columns.names if name in running}
        writer.rows(self.capture.rows(step, loads, placed, stacked, served))

    def _loads_of(self, step: Step) -> npt.NDArray[np.int32]:
        """The number of the load that each row requested and ran with; what else is possible is in `Rows`."""
        lora = step.rows.columns.lora
        loads = np.where(lora == 0, NO_ADAPTER, NOT_IN_ITS_SLOT).astype(np.int32)
        slots = None if step.slots is None else step.slots.cpu().numpy()
        for adapter, load in self.loads.items():
            rows = lora == adapter
            loads[rows if slots is None else rows & (slots == load.slot)] = load.number
        return loads

    def _fresh(self, step: Step) -> Bools:
        """Which rows are at a position that their request has not computed before, `[rows]`. After a preemption it
        computes all of them again."""
        columns = step.rows.columns
        running = self._blocks.running if self._blocks is not None else {}
        again = [(running[name].low, running[name].high) if name in running else (0, 0) for name in columns.names]
        low, high = np.array(again, np.int32).T[:, columns.request]
        fresh: Bools = (columns.position < low) | (columns.position >= high)
        return fresh

    def _blame(self, step: Step, loads: npt.NDArray[np.int32], stacked: Stacked) -> None:
        """Find the rows that did not get what they requested, and the load that each of them is about."""
        columns = step.rows.columns
        astray = loads == NOT_IN_ITS_SLOT
        for adapter, load in self.loads.items():
            # The adapter has a slot, but the engine's table names another one for these rows.
            load.record.not_in_its_slot(columns.by_request(astray & (columns.lora == adapter)))
        plain = loads == NO_ADAPTER
        got: Bools = plain & (stacked.delta_norm > 0).any(axis=1)
        # NaN: there is a shrink, and what became of it was not measured. From now on it is.
        clean = not got.any() and not np.isnan(stacked.delta_norm[plain][:, stacked.present]).any()
        self._clean_steps = self._clean_steps + step.mixed if clean else 0
        if got.any():
            self._blame_slots(columns, got, stacked)

    def _blame_slots(self, columns: RowColumns, got: Bools, stacked: Stacked) -> None:
        """Find the loads whose contribution the rows `got` that requested no adapter. It is that of an active load, of
        one that lost its slot but left its weights there, or of one with which a slot could only be filled in part."""
        for slot, load in self._held.items():
            of_load = contaminated_rows(stacked, got, self._grams.get(slot, self._left.get(slot)))
            load.record.contaminated(columns.by_request(of_load))
            got = got & ~of_load
        half_filled = [load for load in self._known.values() if load.slot is None and load.record.load.refused]
        if len(half_filled) == 1:
            half_filled[0].record.contaminated(columns.by_request(got))


def contaminated_rows(stacked: Stacked, plain: Bools, gram: Any) -> Bools:
    """Which of the rows without an adapter (`plain: [rows]`) got a load's contribution at any module, `[rows]`: there
    the norm that the kernel wrote is the norm that the row would have with the load's G. `gram: [modules, r, r]`, of
    the first modules if others were added later."""
    contaminated = np.zeros(len(plain), np.bool_)
    if gram is not None and stacked.shrink.shape[-1]:
        written, shrink = stacked.delta_norm[plain, : len(gram)], stacked.shrink[plain, : len(gram)].transpose(1, 0, 2)
        squares = ((shrink @ gram.cpu().numpy()) * shrink).sum(-1).T
        own = np.sqrt(squares.clip(min=0))
        # A module that did not run has NaN, which is not greater than anything.
        contaminated[plain] = ((written > 0) & (np.abs(own - written) <= SAME * written)).any(axis=1)
    return contaminated
