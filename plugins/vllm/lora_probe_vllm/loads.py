"""One load of an adapter in a worker: the layers of its modules, and the expected and real contents of its slot.

In: an `Arrival`, the engine's `Homes`, and the base model's files. Out: findings for `read` and `placed`, the contents
of the slot when it was filled (G and digests), and the float32 reference of a module for `agrees`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_probe.base import Base
from lora_probe.engines.load_record import LoadRecord
from lora_probe.errors import ProbeError
from lora_probe.ledger import OK, Finding
from lora_probe.names import Key
from lora_probe.recording import Floats, Load, Placed, TraceWriter
from lora_probe.recording.fingerprint import Fingerprint, fingerprint
from lora_probe.recording.placed import digest_of
from lora_probe.rules.lp5_loading import name_without_home, no_lora_layer, not_measured, not_taken
from lora_probe.rules.stored import Expected, expect
from lora_probe_vllm.arrivals import Arrival
from lora_probe_vllm.seams import is_divided
from lora_probe_vllm.slots import Home, Homes, Placement, judge, judge_fused, placement, placements, slot_values

CACHED_PARAMETERS = 64_000_000
"""Adapters up to this size are kept in memory, so their files or pushed tensors are not needed later."""


@dataclass
class ActiveLoad:
    """A load from the moment it arrives until it is finished."""

    record: LoadRecord
    engine: Homes
    pairs: dict[Key, Expected]
    names: dict[Key, str]
    homes: dict[Key, Home]
    slot: int | None = None
    _placements: dict[Key, Placement | None] = field(default_factory=dict)
    _of_experts: dict[Key, dict[tuple[int, int], Placement]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, arrival: Arrival, load: Load, writer: TraceWriter, engine: Homes, base: Base | None, dtype: str
    ) -> ActiveLoad:
        """Judge `stored`, and write the load with its modules. `dtype` is the coarsest in which its layers compute."""
        adapter = arrival.adapter
        names = engine.of_base(base.shapes) if base is not None else {}
        shapes = {name: base.shapes[name] for name in names} if base is not None else None
        inverse = {engine_name: name for name, engine_name in names.items()}
        engine_names = {pair.key: engine.engine_name(pair, arrival.engine_names) for pair in adapter.modules}
        aliases = {
            pair.module: inverse[name]
            for pair in adapter.modules
            if (name := engine_names[pair.key]) is not None and name in inverse
        }
        record = LoadRecord(writer, load, adapter, expect(adapter, shapes, aliases), dtype)
        active = cls.of(record, engine, engine_names)
        homes = active.homes.items()
        record.announce({key: home.engine_as for key, home in homes}, {key: home.shard for key, home in homes})
        return active

    @classmethod
    def of(cls, record: LoadRecord, engine: Homes, engine_names: Mapping[Key, str | None]) -> ActiveLoad:
        """`engine_names` are the engine's names of the adapter's pairs."""
        pairs = {row.key: row for row in record.expected if row.entry is not None}
        named = {key: engine_names[row.entry.key] for key, row in pairs.items() if row.entry is not None}
        names = {key: name for key, name in named.items() if name is not None}
        homes = {key: home for key, name in names.items() if (home := engine.home_of(name)) is not None}
        load = cls(record, engine, pairs, names, homes)
        if load.cached:
            load._placements = {key: load._read(key) for key, home in homes.items() if not home.split}
            load._of_experts = {key: load._read_experts(key) for key, home in homes.items() if home.split}
        return load

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def adapter_id(self) -> int:
        """The engine's id of the adapter."""
        assert self.record.load.engine_id is not None
        return self.record.load.engine_id

    @property
    def cached(self) -> bool:
        """Whether the expected weights are in memory, and the file or the pushed tensors are not needed any more."""
        return self.record.adapter.parameters <= CACHED_PARAMETERS

    def is_unchanged(self, arrival: Arrival) -> bool:
        """Whether `arrival` is this load again."""
        load = self.record.load
        same = (load.name, load.path, load.digest) == (arrival.name, arrival.path, arrival.digest)
        return same and not load.refused

    def placement(self, key: Key) -> Placement | None:
        """The expected weights of a module on this rank, from the adapter; None for half a pair.

        Raises:
            ProbeError: the file of a large adapter can no longer be read, or it was pushed and not copied.
        """
        return self._placements[key] if key in self._placements else self._read(key)

    def of_experts(self, key: Key) -> dict[tuple[int, int], Placement]:
        """The same for a pair of fused experts, by expert and projection."""
        return self._of_experts[key] if key in self._of_experts else self._read_experts(key)

    def why_unjudged(self, key: Key) -> str | None:
        """Why a module's contribution has no reference; None if it has one, or if the file would have to be read."""
        home = self.homes[key]
        if home.routes and is_divided(home.layer):
            return "the ranks of fully sharded experts join x·Aᵀ between two kernels, which is not captured"
        if not self.cached and self.record.adapter.content:
            try:
                self.of_experts(key) if self.homes[key].split else self.placement(key)
            except ProbeError as error:
                return error.message
        return None

    def _read(self, key: Key) -> Placement | None:
        entry = self.pairs[key].entry
        return placement(self.record.adapter, entry, self.homes[key]) if entry is not None else None

    def _read_experts(self, key: Key) -> dict[tuple[int, int], Placement]:
        entry = self.pairs[key].entry
        return placements(self.record.adapter, entry, self.homes[key]) if entry is not None else {}

    def judge_read(self, lora: Any) -> None:
        """`read`: which pairs the loader accepted, and which of them belong to a module that exists.

        A module on another pipeline rank is judged there; nothing is written for it here.
        """
        read: dict[Key, Finding] = {}
        placed: dict[Key, Finding] = {}
        elsewhere: set[Key] = set()
        for key, row in self.pairs.items():
            assert row.entry is not None
            name = self.names.get(key)
            if name is not None and self.engine.on_another_rank(name):
                elsewhere.add(key)
            elif name is None or name not in self.engine.known:
                intended = row.module if row.module != row.entry.module else None
                read[key] = name_without_home(row.entry.stored_as, intended, "vLLM", self.record.adapter.source)
            elif not self.engine.is_taken(lora, name) and not self._is_fused(lora, key):
                read[key] = not_taken("vLLM", "the module exists, but its pair was skipped")
            else:
                read[key] = OK
                if key not in self.homes:
                    targets = self.engine.manager.lora_config.target_modules
                    why = f"--lora-target-modules is {' '.join(targets)}" if targets else "its class has none there"
                    placed[key] = no_lora_layer("vLLM", why)
        self.record.leave_to_another_rank(elsewhere)
        self.record.station("read", read)
        self.record.station("placed", placed)

    def _is_fused(self, lora: Any, key: Key) -> bool:
        """Whether a model of an adapter was packed before it arrived: then the parts of a layer have no names."""
        home = self.homes.get(key)
        return home is not None and home.slices > 1 and lora.get_lora(home.name) is not None

    def judge_slots(self, moment: str) -> None:
        """`placed`: the slot compared with the values expected from the adapter; and the fingerprints of what it
        holds."""
        assert self.slot is not None
        placed, source = {}, self.record.adapter.source
        for key, home in self.homes.items():
            if self.record.ended(key):
                continue
            try:
                if home.split:
                    placed[key] = judge_fused(self.of_experts(key), home, self.slot, moment, source)
                else:
                    placed[key] = judge(self.placement(key), home, self.slot, moment, source)
            except ProbeError as error:
                placed[key] = not_measured(error.message)
        self.record.station("placed", placed)
        self.record.running_with(self._fingerprints())

    def leftovers(self) -> list[str]:
        """The engine's modules that the adapter does not have, and whose slot is not empty."""
        assert self.slot is not None
        own, filled = {self.names[key] for key in self.homes}, []
        for name, home in self.engine.wrapped.items():
            held = slot_values(home, self.slot) if name not in own else None
            if held is not None and held[0].any() and held[1].any():
                filled.append(name)
        return filled

    def contents(self, keys: Iterable[Key]) -> SlotContents:
        """The contents of the slot at `keys`, modules of this load. They are read once, when the slot was filled."""
        assert self.slot is not None
        grams, digests = {}, {}
        for key in keys:
            if (held := slot_values(self.homes[key], self.slot)) is None:
                continue
            b = held[1].float()
            grams[key] = (b.T @ b).to(self.homes[key].layer.lora_a_stacked[0].device)
            if (pair := self._pair_in_slot(key)) is not None:
                digests[key] = digest_of(*pair)
        return SlotContents(grams, digests)

    def _fingerprints(self) -> dict[Key, Fingerprint]:
        """Those of the slot, as far as its layers are recorded."""
        keys = [key for key, home in self.homes.items() if home.recordable and not self.record.ended(key)]
        pairs = {key: pair for key in keys if (pair := self._pair_in_slot(key)) is not None}
        return {key: fingerprint(*pair) for key, pair in pairs.items()}

    def _pair_in_slot(self, key: Key) -> tuple[Floats, Floats] | None:
        """A and s·B of the whole module in the slot, at the rank of the adapter; None if it is not filled, or if this
        rank has another part than that of the file."""
        assert self.slot is not None
        if (held := slot_values(self.homes[key], self.slot)) is None:
            return None
        if self.homes[key].shard is not None:
            return self._whole(key, held[0].dtype)
        entry = self.pairs[key].entry
        own = (entry.rank if entry else None) or held[1].shape[1]
        return held[0].float()[:own].numpy(), held[1].float()[:, :own].numpy()

    def _whole(self, key: Key, dtype: torch.dtype) -> tuple[Floats, Floats] | None:
        """A and s·B as a single rank would have them, if this one has exactly its part of the adapter."""
        assert self.slot is not None
        entry = self.pairs[key].entry
        try:
            expected = self.placement(key)
            if entry is None or judge(expected, self.homes[key], self.slot, "", "") != OK:
                return None
            values = self.record.adapter.values
            assert entry.a is not None
            assert entry.b is not None
            whole = Placement(values(entry.a), values(entry.b), entry.scaling)
        except ProbeError:
            return None
        a, b = (half.float().numpy() for half in whole.replayed(dtype))
        return a, b


@dataclass(frozen=True)
class SlotContents:
    """The weights of a load, module by module: G `[r, r]` on the device of the layers, and a digest that is the same in
    two runs with the same weights."""

    grams: dict[Key, torch.Tensor]
    digests: dict[Key, str]

    def stacked(self, keys: tuple[Key, ...]) -> torch.Tensor | None:
        """G for each of `keys`, `[modules, r, r]`, zero for modules of other loads; None if there are none."""
        if not self.grams:
            return None
        nothing = torch.zeros_like(next(iter(self.grams.values())))
        return torch.stack([self.grams.get(key, nothing) for key in keys])

    def placed(self, keys: tuple[Key, ...], gram: torch.Tensor | None) -> Placed:
        """The same for the trace; `gram` is None if the level does not keep it."""
        digests = tuple(self.digests.get(key, "") for key in keys)
        return Placed(digests, gram.cpu().numpy() if gram is not None else None)
