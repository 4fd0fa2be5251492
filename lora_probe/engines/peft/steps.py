"""The rows of every forward pass of a live PEFT model while one load runs.

In: the forward passes, each in a `with` block, and the values that the hooks of a `Capture` captured. Out: rows for the
trace, counts for `applied`, samples for `agrees`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from lora_probe.adapter.fused import of_each
from lora_probe.adapter.pair_values import extra_of, pair_values
from lora_probe.adapter.variants import DORA, LORA_BIAS
from lora_probe.engines.peft.capture import Capture, Step
from lora_probe.engines.peft.dora import base_weight, decomposed, why_no_formula
from lora_probe.engines.peft.loads import ActiveLoad
from lora_probe.engines.sampler import Sampler
from lora_probe.recording import DECODE, PREFILL, TraceWriter
from lora_probe.recording.rows import kept


class Stepping(Protocol):
    """What records the forward passes of a request."""

    def stepping(
        self, request: str, positions: Sequence[int], prompt: int, first: int | None = 0
    ) -> AbstractContextManager[None]:
        """See `Steps.stepping`."""
        ...


@dataclass(frozen=True)
class Together:
    """The steps of adapters that are all active at once. A request has a name for each of them."""

    of: Mapping[str, Steps]

    @contextmanager
    def stepping(self, request: str, positions: Sequence[int], prompt: int, first: int | None = 0) -> Iterator[None]:
        """See `Steps.stepping`."""
        with ExitStack() as stack:
            for name, steps in self.of.items():
                stack.enter_context(steps.stepping(f"{request}-{name}", positions, prompt, first))
            yield


class Steps:
    """Records steps of `load`; the hooks of `capture` are on its layers."""

    def __init__(self, load: ActiveLoad, capture: Capture, writer: TraceWriter, in_parts: bool = False) -> None:
        """`in_parts`: a forward pass runs only some of the modules, as those of encoder and decoder do."""
        self._in_parts = in_parts
        self._load, self._capture, self._writer = load, capture, writer
        self._sampler = Sampler()
        self._comparable = {row.key for row in load.record.expected if row.spectrum is not None}
        placed = load.placed(capture.keys)
        self._placed = {load.number: placed if kept("shrink", capture.keep) else replace(placed, gram=None)}

    @contextmanager
    def stepping(self, request: str, positions: Sequence[int], prompt: int, first: int | None = 0) -> Iterator[None]:
        """One forward pass over `positions` of a request; positions below `prompt` are the prompt's, and the adapter is
        active from `first` on (None: nowhere)."""
        phases = [PREFILL if at < prompt else DECODE for at in positions]
        active = [number for number, position in enumerate(positions) if first is not None and position >= first]
        # Rows without the adapter have nothing to compare.
        picked = self._sampler.pick([request] * len(active), [phases[number] for number in active])
        with self._capture.stepping([active[number] for number in picked], len(phases)) as step:
            yield
        self._load.record.ran(len(active), () if self._in_parts else step.ran, len(active))
        for key, rows in step.called.items() if self._in_parts else ():
            self._load.record.routed([key], rows, rows if key in step.ran else 0)
        self._sample(step)
        if self._capture.keys:
            self._writer.rows(self._capture.rows(step, request, list(positions), phases, self._placed))

    def _sample(self, step: Step) -> None:
        record = self._load.record
        for key, weights in step.added.items():
            pair = self._load.pairs[key]
            if pair.a is not None and pair.b is not None:
                halves = of_each(record.adapter.values(pair.a), record.adapter.values(pair.b), len(weights))
                for weight, (a, b) in zip(weights, halves, strict=True):
                    # The rows of A are inputs on which all of ΔW shows.
                    record.sample(key, a, a @ weight.T, a, b, pair.scaling)
        for key, (x, delta) in step.samples.items():
            pair, slot = self._load.pairs[key], self._load.slots[key[0]]
            if key not in self._comparable or not slot.has_formula:
                continue
            a, b = pair_values(record.adapter, pair)
            if not slot.is_dora:
                # Without its flag in the config, PEFT drops a bias of the file.
                bias = extra_of(pair, LORA_BIAS.field) if slot.third(LORA_BIAS.field) is not None else None
                record.sample(key, x, delta, a, b, pair.scaling, record.adapter.values(bias) if bias else None)
            elif (vector := extra_of(pair, DORA.field)) is not None and why_no_formula(slot) is None:
                weight = base_weight(slot)
                assert weight is not None
                magnitude = record.adapter.values(vector).reshape(-1)
                record.compare(key, delta, *decomposed(x, weight, a, b, pair.scaling, magnitude))
