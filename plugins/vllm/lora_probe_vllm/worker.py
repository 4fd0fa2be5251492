"""The probe in a vLLM worker: the loading story, the stations, and the rows of every step.

In: `LORA_PROBE_TRACE` and `LORA_PROBE_KEEP`, seen by `arm` before the worker is built. Out: the folder
`vllm-rank-N/` of a trace. A failure of the probe never fails a request: it is written down, and the probe steps aside.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from lora_probe.adapter import Key, open_adapter
from lora_probe.base import open_base
from lora_probe.engines.measure import Account, Sampler, placed_digest
from lora_probe.errors import ProbeError
from lora_probe.expected import Expected, expect
from lora_probe.ledger import OK, Finding
from lora_probe.rules.loading import name_without_home, no_lora_layer, not_taken
from lora_probe.tracefile import DECODE, PREFILL, SCHEMA, Level, Load, Process, TraceWriter
from lora_probe_vllm.capture import Capture, Step, stack
from lora_probe_vllm.seams import (
    StepRows,
    engine_settings,
    manager_of,
    v1_rows,
    vllm_version,
    why_not_recordable,
)
from lora_probe_vllm.slots import Homes, engine_names, judge, placement, slot_values


@dataclass
class ActiveLoad:
    """One load of an adapter in this worker: its account, and where its modules live."""

    account: Account
    pairs: dict[Key, Expected]
    names: dict[Key, str]
    slot: int | None = None
    digests: dict[Key, str] = field(default_factory=dict)


class Probe:
    """Everything the probe holds in one worker, from the worker's construction until `finish`."""

    def __init__(self, worker: Any, folder: Path, keep: Level) -> None:
        self.worker, self.keep = worker, keep
        self.rank = int(worker.rank)
        self.capture = Capture(keep)
        self.sampler = Sampler()
        self.homes: Homes | None = None
        self.shapes: dict[str, tuple[int, int]] | None = None
        self.loads: dict[int, ActiveLoad] = {}
        self.generations: dict[int, int] = {}
        self.grams: dict[int, Any] = {}
        self.not_recorded: str | None = None
        self.broken = False
        self._writer: TraceWriter | None = None
        self._load_numbers = 0
        self.open(folder, keep)
        # A script of the user's own ends without asking for the last stations.
        atexit.register(self.finish)

    @property
    def writer(self) -> TraceWriter:
        assert self._writer is not None
        return self._writer

    @property
    def recording(self) -> bool:
        return self._writer is not None

    def open(self, folder: Path, keep: Level) -> None:
        """Begin to write into `folder`, or beside it under a number if this rank has written there before."""
        self.finish()
        first, number = folder, 1
        while (folder / f"vllm-rank-{self.rank}").exists():
            number += 1
            folder = first.with_name(f"{first.stem}-{number}{first.suffix}")
        self.keep = self.capture.keep = keep
        config = self.worker.vllm_config
        process = Process(
            schema=SCHEMA,
            role="worker",
            engine="vllm",
            rank=self.rank,
            pid=os.getpid(),
            versions={"vllm": vllm_version()},
            keep=keep,
            device=str(config.device_config.device_type),
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            settings=engine_settings(config),
            not_recorded=self.not_recorded,
        )
        self._writer = TraceWriter(folder / f"vllm-rank-{self.rank}", process)
        self._load_numbers = 0
        self.sampler = Sampler()
        if self.homes is not None:
            self._tell_of_layers("replaced before this recording began")

    @contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """A failure of ours is recorded, never raised into vLLM."""
        try:
            yield
        # Whatever it is, the request must not pay for it; it is written down and shown.
        except Exception as error:
            self.broken = True
            self.capture.step = None
            text = f"the probe failed at `{stage}` and stepped aside: {error!r}"
            logging.getLogger("vllm.lora_probe").error(text)
            try:
                self.writer.event("probe", text)
            except OSError:
                # The disk is full or gone: nothing more can be recorded, and the log has said why.
                self._writer = None

    def model_loaded(self, runner: Any, seconds: float) -> None:
        """The LoRA manager was made, and the model's layers were replaced in place."""
        manager = manager_of(runner)
        self.homes = Homes(manager)
        config = self.worker.vllm_config
        self.not_recorded = why_not_recordable(config, runner)
        self.writer.describe(not_recorded=self.not_recorded)
        self._tell_of_manager("replaced", seconds)
        try:
            self.shapes = dict(open_base(config.model_config.model).shapes) or None
        except ProbeError as error:
            self.writer.event("base", f"the base's files are not readable here: {error.message}")

    def _tell_of_manager(self, when: str, seconds: float | None = None) -> None:
        assert self.homes is not None
        manager = self.homes.manager
        self.writer.event(
            "manager",
            f"{type(manager).__name__} made, {len(manager.modules)} layers {when} in {type(manager.model).__name__}",
            seconds=seconds,
            slots=manager.lora_slots,
            max_lora_rank=manager.lora_config.max_lora_rank,
        )

    def _tell_of_layers(self, when: str) -> None:
        assert self.homes is not None
        for name, layer in self.homes.manager.modules.items():
            self.wrapped(name, layer)
        self._tell_of_manager(when)

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
        """An adapter is about to be read: write down what its file holds before vLLM sees it."""
        assert self.homes is not None
        adapter_id = int(request.lora_int_id)
        path = str(request.lora_path)
        try:
            adapter = open_adapter(path)
        except ProbeError as error:
            self.writer.event("read", f"{request.lora_name}: {error.message}")
            return None
        number, self._load_numbers = self._load_numbers, self._load_numbers + 1
        generation = self.generations[adapter_id] = self.generations.get(adapter_id, -1) + 1
        load = Load(number, request.lora_name, str(adapter.path), adapter.digest(), adapter_id, generation)
        dtype = str(self.homes.manager.lora_config.lora_dtype).removeprefix("torch.")
        account = Account(self.writer, load, adapter, expect(adapter, self.shapes), dtype)
        pairs = {row.key: row for row in account.expected if row.entry is not None}
        entries = {key: row.entry for key, row in pairs.items() if row.entry is not None}
        names = {key: name for key, pair in entries.items() if (name := self.homes.engine_name(pair)) is not None}
        account.announce(engine_names(entries, self.homes))
        self.writer.event("read", f"{request.lora_name} from {path}", tensors=len(adapter.weights.tensors))
        return ActiveLoad(account, pairs, names)

    def was_read(self, active: ActiveLoad, lora: Any, seconds: float) -> None:
        """The loader is done: which pairs it took, and which of them name a module that exists."""
        assert self.homes is not None
        read: dict[Key, Finding] = {}
        placed: dict[Key, Finding] = {}
        for key, row in active.pairs.items():
            assert row.entry is not None
            name = active.names.get(key)
            if name is None or name not in self.homes.known:
                meant = row.module if row.module != row.entry.module else None
                read[key] = name_without_home(row.entry.stored_as, meant, "vLLM")
            elif lora.get_lora(name) is None:
                read[key] = not_taken("vLLM")
            else:
                read[key] = OK
                if name not in self.homes.wrapped:
                    targets = self.homes.manager.lora_config.target_modules
                    why = (
                        f"--lora-target-modules is {' '.join(targets)}"
                        if targets
                        else "this model class has none there"
                    )
                    placed[key] = no_lora_layer("vLLM", why)
        active.account.station("read", read)
        active.account.station("placed", placed)
        self.writer.event("read", f"{len(lora.loras)} pairs taken", seconds=seconds)

    def refused(self, active: ActiveLoad, error: BaseException, stage: str) -> None:
        message = " ".join(str(error).split()) or f"{type(error).__name__} without a message"
        self.writer.event("refused", f"while vLLM was {stage}: {message}")
        active.account.load = msgspec.structs.replace(active.account.load, refused=True, message=message)
        self.writer.record(active.account.load)

    def activated(self, adapter_id: int, slot: int, seconds: float, said: list[str]) -> None:
        """The slot is filled: compare it with the file, and record the touched layers from now on."""
        active = self.loads.get(adapter_id)
        if active is None or self.homes is None:
            return
        active.slot = slot
        active.account.load = msgspec.structs.replace(active.account.load, slot=slot, said=said)
        self.writer.record(active.account.load)
        self.writer.event("activate", f"{active.account.load.name} is in slot {slot}", seconds=seconds)
        self.judge_slots(active, "at activation")
        if self.keep == "events" or self.not_recorded:
            return
        for key in active.pairs:
            home = self.homes.wrapped.get(active.names.get(key, ""))
            if key not in active.account.gone and home is not None and home.recordable:
                self.capture.watch(key, home.layer, home.slice)
        self._remember_slot(active)

    def evicted(self, adapter_id: int) -> None:
        """The adapter loses its slot; what is in it afterwards is no longer this load's."""
        active = self.loads[adapter_id]
        if active.slot is not None:
            self.writer.event("evict", f"{active.account.load.name} leaves slot {active.slot}")
            self.judge_slots(active, "when it was evicted")
            self.grams.pop(active.slot, None)
            active.slot = None

    def judge_slots(self, active: ActiveLoad, moment: str) -> None:
        assert self.homes is not None
        assert active.slot is not None
        placed = {}
        for key, row in active.pairs.items():
            home = self.homes.wrapped.get(active.names.get(key, ""))
            if key not in active.account.gone and home is not None and row.entry is not None:
                placed[key] = judge(active.account.adapter, row.entry, home, active.slot, moment)
        active.account.station("placed", placed)

    def _remember_slot(self, active: ActiveLoad) -> None:
        """G of every recorded column for each slot in use, and the digest of what the slot holds."""
        import torch

        assert self.homes is not None
        for other in self.loads.values():
            if other.slot is None:
                continue
            grams = []
            for key in self.capture.columns:
                home = self.homes.wrapped[other.names[key]] if key in other.names else None
                held = slot_values(home, other.slot) if home is not None else None
                if held is None:
                    rank = self.homes.manager.lora_config.max_lora_rank
                    grams.append(torch.zeros(rank, rank))
                    continue
                a, b = held[0].float(), held[1].float()
                grams.append(b.T @ b)
                pair = other.pairs[key].entry if key in other.pairs else None
                rank = (pair.rank if pair else None) or a.shape[0]
                other.digests[key] = placed_digest(a[:rank].numpy(), b[:, :rank].numpy())
            if grams:
                device = next(iter(self.homes.wrapped.values())).layer.lora_a_stacked[0].device
                self.grams[other.slot] = torch.stack(grams).to(device)

    @contextmanager
    def stepping(self, runner: Any, scheduler_output: Any) -> Iterator[None]:
        """One `execute_model`: its rows are known when the model is called."""
        if self.broken or not self.capture.columns:
            yield
            return

        def before(model: Any, args: Any, kwargs: Any) -> None:
            with self.guard("the start of a step"):
                rows = v1_rows(runner, scheduler_output)
                phases = [
                    DECODE if at >= end else PREFILL
                    for at, end in zip(rows.positions, rows.prompt_lengths, strict=True)
                ]
                sampled = [n for n in self.sampler.pick(rows.requests, phases) if rows.lora[n]]
                self.capture.step = Step(rows, sampled, mixed=0 in rows.lora)

        handle = runner.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            step, self.capture.step = self.capture.step, None
            if step is not None:
                with self.guard("the end of a step"):
                    self._close_step(step)

    def _close_step(self, step: Step) -> None:
        keys = tuple(self.capture.columns)
        numbers = {adapter: active.account.load.load for adapter, active in self.loads.items()}
        loads = [numbers.get(adapter, -1) for adapter in step.rows.lora]
        stacked = stack(step, keys, self.grams)
        slots = step.slots.tolist() if step.slots is not None else []
        for adapter in step.rows.adapters:
            if (active := self.loads.get(adapter)) is not None:
                self._tally(active, adapter, step, slots, stacked.delta_norm)
        placed = self._placed(keys, step.rows)
        self.writer.rows(self.capture.rows(step, loads, self.grams, placed, stacked))

    def _tally(self, active: ActiveLoad, adapter: int, step: Step, slots: list[int], norms: Any) -> None:
        mine = [number for number, lora in enumerate(step.rows.lora) if lora == adapter]
        active.account.asked += len(mine)
        if not slots:
            return
        right = sum(slots[number] == active.slot for number in mine)
        plain = [number for number, lora in enumerate(step.rows.lora) if lora == 0]
        ran = [key for key in self.capture.columns if key in step.shrink and key in active.pairs]
        contaminated = {}
        for index, key in enumerate(self.capture.columns):
            if key in active.pairs and plain and (rows := int((norms[plain, index] > 0).sum())):
                contaminated[key] = rows
        active.account.ran(ran, right, contaminated)
        self._sample(active, adapter, step)

    def _sample(self, active: ActiveLoad, adapter: int, step: Step) -> None:
        assert self.homes is not None
        rows = [number for number, row in enumerate(step.sampled) if step.rows.lora[row] == adapter]
        if not rows:
            return
        for key, (x, delta) in step.samples.items():
            row = active.pairs.get(key)
            if row is None or row.entry is None or row.spectrum is None:
                continue
            wanted = placement(active.account.adapter, row.entry, self.homes.wrapped[active.names[key]])
            if wanted is not None:
                taken, written = (tensor[rows].float().cpu().numpy() for tensor in (x, delta))
                active.account.sample(key, taken, written, wanted.a, wanted.b, wanted.scaling)

    def _placed(self, keys: tuple[Key, ...], rows: StepRows) -> tuple[str, ...]:
        active = next((self.loads[adapter] for adapter in rows.adapters if adapter in self.loads), None)
        return tuple(active.digests.get(key, "") for key in keys) if active else ("",) * len(keys)

    def finish(self) -> None:
        """Judge the slots again, write `applied` and `agrees`, and close the recording. May be called again."""
        if self._writer is None:
            return
        with self.guard("the end of the run"):
            for active in self.loads.values():
                if active.slot is not None:
                    self.judge_slots(active, "when the run ended")
                if not active.account.load.refused:
                    active.account.finish(self._why_unmeasured)
        self.loads, self.grams = {}, {}
        self.capture.close()
        with self.guard("closing"):
            self.writer.close()
        self._writer = None

    def _why_unmeasured(self, key: Key) -> str | None:
        if self.keep == "events":
            return "contributions were not recorded (--keep events)"
        if self.broken:
            return "the probe failed and stepped aside (see the loading story)"
        if self.not_recorded:
            return f"contributions not recorded: {self.not_recorded}"
        if key not in self.capture.columns:
            return "this kind of layer is applied but not captured yet (embeddings, lm_head, experts)"
        return None
