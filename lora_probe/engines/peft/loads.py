"""One load of an adapter in PEFT: it is attached to the base model and judged, and its live weights are recorded.

In: a live base model, and the adapter's folder. Out: the live LoRA layers, or PEFT's refusal with its own message;
findings for `read` and `placed`; G and a digest for each module.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lora_probe.adapter import AdapterModule, adapter_in
from lora_probe.adapter.spectrum import gram
from lora_probe.base import Shapes
from lora_probe.engines.load_record import LoadRecord
from lora_probe.engines.peft.models import first_lines, short
from lora_probe.engines.peft.slots import ADAPTER, Slot, judge, multiplied, slot_of, slots_in
from lora_probe.ledger import OK, Finding
from lora_probe.names import PREFIX, Key
from lora_probe.recording import Floats, NamedAdapter, Placed, RunSpec, TraceWriter
from lora_probe.recording.fingerprint import fingerprint
from lora_probe.recording.placed import digest_of
from lora_probe.rules.lp2_names import odd_ending
from lora_probe.rules.lp5_loading import name_without_home, no_lora_layer, not_taken
from lora_probe.rules.stored import Expected


@dataclass(frozen=True)
class Attached:
    """An adapter after PEFT loaded it: PEFT's model, the slots of its live LoRA layers by module, and PEFT's warnings.
    `refused` is PEFT's message about an adapter that it does not load."""

    model: Any
    slots: Mapping[str, Slot]
    logged: list[str]
    refused: str | None = None

    def lora_dtype(self, default: str) -> str:
        """The dtype that the contribution is computed in: the live lora_B's."""
        for slot in self.slots.values():
            return str(slot.weights[1].dtype).removeprefix("torch.")
        return default


def attach(model: Any, adapter: NamedAdapter, spec: RunSpec, writer: TraceWriter, number: int = 0) -> Attached:
    """Let PEFT load an adapter: into a base model, or as one more (`number` > 0) into a model that has some."""
    from peft import PeftModel

    called = ADAPTER if number == 0 else f"beside-{number}"
    function, done = ("from_pretrained", "replaced") if number == 0 else ("load_adapter", "extended")
    writer.event("read", f"PeftModel.{function}({adapter.path!r})")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = time.perf_counter()
        try:
            if number == 0:
                model = PeftModel.from_pretrained(model, adapter.path, adapter_name=called)
            else:
                model.load_adapter(adapter.path, adapter_name=called)
        # A refusal is a result: whatever PEFT raises here is recorded as its message about the adapter.
        except Exception as error:
            message = first_lines(error)
            writer.event("refused", message, seconds=round(time.perf_counter() - started, 3))
            if number and called in model.peft_config:
                # PEFT has put it into its layers before it refused its weights.
                model.delete_adapter(called)
            return Attached(model, {}, [], message)
    _cast(model, spec.options.get("lora_dtype", "auto"))
    model.eval()
    slots = slots_in(model, called)
    _announce(slots, writer)
    writer.event(
        "activate",
        f"{len(slots)} layers {done}, adapter `{adapter.name}` active as `{called}`",
        seconds=round(time.perf_counter() - started, 3),
    )
    logged = [short(str(warning.message)) for warning in caught if issubclass(warning.category, UserWarning)]
    return Attached(model, slots, logged)


def _announce(slots: Mapping[str, Slot], writer: TraceWriter) -> None:
    """Write which layers PEFT has replaced."""
    from peft.tuners.lora import ParamWrapper

    for name, slot in slots.items():
        of = f" of {slot.layer.parameter_name}" if isinstance(slot.layer, ParamWrapper) else ""
        kind = type(slot.layer.get_base_layer()).__name__
        writer.event("wrap", f"{kind} -> {type(slot.layer).__name__}{of}", module=name.removesuffix(".base_layer"))


def _cast(peft_model: Any, dtype: str) -> None:
    """Cast the float32 that PEFT loads to the requested dtype, so that every value is rounded once."""
    if dtype == "auto":
        return
    import torch

    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))


@dataclass(frozen=True)
class ActiveLoad:
    """A load after PEFT loaded it. `model` is PEFT's, `slots` are those of the live layers by module, `shapes` the
    modules of the base model."""

    record: LoadRecord
    model: Any
    slots: Mapping[str, Slot]
    shapes: Shapes

    @property
    def number(self) -> int:
        return self.record.number

    @property
    def called(self) -> str:
        """The name of the adapter inside PEFT."""
        return next((slot.adapter for slot in self.slots.values()), ADAPTER)

    @cached_property
    def pairs(self) -> dict[Key, AdapterModule]:
        """The pairs of the file by module."""
        return {row.key: row.entry for row in self.record.expected if row.entry is not None}

    def judge_read(self) -> None:
        """`read`: which pairs PEFT accepted, and which of them belong to a module that exists and has a LoRA layer."""
        read: dict[Key, Finding] = {}
        placed: dict[Key, Finding] = {}
        for row in self.record.expected:
            if row.entry is None:
                continue
            read[row.key] = self._judge_name(row)
            if read[row.key] == OK and row.module not in self.slots:
                placed[row.key] = no_lora_layer("PEFT", "the config does not target it")
        self.record.station("read", read)
        self.record.station("placed", placed)

    def _judge_name(self, row: Expected) -> Finding:
        assert row.entry is not None
        # A module that PEFT wraps exists, even if it is not in the shapes (as fused experts).
        wrapped = row.module == row.entry.module and row.module in self.slots
        if not wrapped and (row.homeless or row.module not in self.shapes):
            meant = row.module if row.module != row.entry.module else None
            return name_without_home(row.entry.stored_as, meant, "PEFT")
        if not all(tensor.name.startswith(PREFIX) for tensor in row.entry.tensors):
            return not_taken("PEFT", f"its name does not begin with `{PREFIX}`")
        if not {adapter_in(tensor) for tensor in row.entry.tensors} <= {None, self.called}:
            return not_taken("PEFT", "its name contains the name of another adapter")
        embedded = row.module in self.slots and self.slots[row.module].looks_up
        for tensor in filter(None, (row.entry.a, row.entry.b)):
            if (ending := odd_ending(tensor.name, embedded, adapter_in(tensor))) is not None:
                return ending
        return OK

    def judge_slots(self, moment: str) -> None:
        """`placed`: the live layers against the file; and the fingerprints of their weights."""
        self.record.station(
            "placed",
            {
                key: judge(self.record.adapter, pair, slot_of(self.slots, key, pair), moment)
                for key, pair in self.pairs.items()
                if not self.record.ended(key)
            },
        )
        weights = {key: self._multiplied(key, slot) for key, slot in self.recordable().items()}
        # What somebody has put into a layer may be no pair.
        pairs = {key: (a, b) for key, (a, b) in weights.items() if len(a) == b.shape[1]}
        self.record.running_with({key: fingerprint(*pair) for key, pair in pairs.items()})

    def _multiplied(self, key: Key, slot: Slot) -> tuple[Floats, Floats]:
        """The live A and s·B of a module."""
        a, b = multiplied(slot, self.pairs[key])
        return a, b * np.float32(slot.scaling)

    def recordable(self) -> dict[Key, Slot]:
        """The slots that the hooks support."""
        return {
            key: slot
            for key in self.pairs
            if key[1] == "weight" and (slot := self.slots.get(key[0])) is not None and slot.recordable
        }

    def experts(self) -> dict[Key, Slot]:
        """The slots in the wrappers of expert parameters."""
        pairs = self.pairs.items()
        wrappers = {key: slot_of(self.slots, key, pair) for key, pair in pairs if key[1] != "weight"}
        return {key: slot for key, slot in wrappers.items() if slot is not None}

    def placed(self, keys: tuple[Key, ...]) -> Placed:
        """G and digests of the live weights at `keys`, padded to the largest rank."""
        held = [self._multiplied(key, self.slots[key[0]]) for key in keys]
        rank = max((b.shape[1] for _, b in held), default=0)
        grams = np.zeros((len(keys), rank, rank), np.float32)
        for number, (_, b) in enumerate(held):
            grams[number, : b.shape[1], : b.shape[1]] = gram(b, 1.0)
        return Placed(tuple(digest_of(*pair) for pair in held), grams)
