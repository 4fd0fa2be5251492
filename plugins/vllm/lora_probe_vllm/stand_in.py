"""Stand-ins for the Punica wrapper of a linear layer or an embedding.

In: the calls of a LoRA layer while vLLM runs a step. Out: x, the base output before the contribution is added, the
shrink of every slice, and samples of x and delta, in the open `Step`. vLLM's own shrink and expand kernels are called
once each.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lora_probe_vllm.measured import Column, Head, Step, norm, slice_norms, without_padding
from lora_probe_vllm.seams import request_slots


class Recording(Protocol):
    """What a stand-in needs to know of the capture that it belongs to."""

    guard: Callable[[str], AbstractContextManager[None]]

    @property
    def step(self) -> Step | None:
        """The open step, if any."""

    def look_up_slots(self, step: Step, punica: Any) -> None:
        """Which slot vLLM's table has for each row, once in a step."""

    def wants_delta(self, step: Step) -> bool:
        """Whether this step's contribution is computed in a separate buffer before it is added."""

    def keeps(self, table: str) -> bool:
        """Whether the level keeps a table of single modules."""


@dataclass
class Watched:
    """A recorded layer. `number` is its place among them; its slices have `columns`."""

    layer: Any
    number: int
    widths: list[int] | None = None
    """Those of the slices of a layer without LoRA; a LoRA layer has them itself."""
    columns: list[Column] = field(default_factory=list)
    partial: bool = False
    """Its input is sharded over ranks, so what runs here is a partial sum."""
    embeds: bool = False
    """It is an embedding: its input are the ids of tokens."""
    routes: bool = False
    """It is a layer of experts, which has no columns."""
    samples: bool = False
    """It is a head over the vocabulary, which has no columns either."""


class StandIn:
    """Replaces the `punica_wrapper` of one layer: delegates everything, and records `add_lora_linear`."""

    def __init__(self, real: Any, watched: Watched, capture: Recording) -> None:
        self._real, self._watched, self._capture = real, watched, capture

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> Any:
        """`y += s·(x·Aᵀ)·Bᵀ` with vLLM's kernels. `y: [tokens, out of all slices]`, `x: [tokens, in]`."""
        capture = self._capture
        step = capture.step
        if step is None or kwargs.get("buffer") is not None:
            return self._real.add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs)
        rank = lora_b_stacked[0].size(-1)
        # The same buffer as the kernels allocate: float32, contiguous, one slice after the other.
        shrink = torch.zeros((len(output_slices), x.size(0), rank), dtype=torch.float32, device=x.device)
        with capture.guard("a layer's input"):
            self._before(step, y, x, output_slices)
        self._real.add_shrink(shrink, x, lora_a_stacked, scale)
        add_inputs = kwargs.get("add_inputs", True)
        if capture.wants_delta(step):
            delta = torch.zeros_like(y)
            self._real.add_expand(delta, shrink, lora_b_stacked, output_slices, add_inputs=True)
            y.add_(delta) if add_inputs else y.copy_(delta)
            with capture.guard("a layer's contribution"):
                self._with_delta(step, delta, x, output_slices)
        else:
            self._real.add_expand(y, shrink, lora_b_stacked, output_slices, add_inputs=add_inputs)
        step.shrink[self._watched.number] = shrink
        return y

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, *more: Any, **kwargs: Any
    ) -> Any:
        """`y += s·x·Bᵀ` with vLLM's kernel. `y: [tokens, out]`, `x: [tokens, r]` are columns of A."""
        capture = self._capture
        step, real = capture.step, self._real.add_lora_embedding
        if step is None:
            return real(y, x, lora_b_stacked, *more, **kwargs)
        with capture.guard("an embedding's input"):
            self._before(step, y, torch.ones_like(x[:, :1]), (y.size(-1),))
        if capture.wants_delta(step):
            delta = torch.zeros_like(y)
            real(delta, x, lora_b_stacked, *more, **kwargs)
            y.add_(delta)
            with capture.guard("an embedding's contribution"):
                self._with_delta(step, delta, x, (y.size(-1),))
        else:
            real(y, x, lora_b_stacked, *more, **kwargs)
        with capture.guard("an embedding's columns of A"):
            # Rows without an adapter look up a column too, which nothing is made of.
            columns = x[: len(step.rows)].float() * (step.slots >= 0)[:, None]
            step.shrink[self._watched.number] = columns[None]
        return y

    def _before(self, step: Step, y: torch.Tensor, x: torch.Tensor, output_slices: tuple[int, ...]) -> None:
        count, layer = len(step.rows), self._watched.number
        self._capture.look_up_slots(step, self._real)
        step.widths[layer] = output_slices
        step.x_norm[layer] = norm(without_padding(x, count))
        step.base_norm[layer] = slice_norms(without_padding(y, count), output_slices)
        if self._capture.keeps("x"):
            bases = y[:count].split(list(output_slices), dim=-1)
            for column in self._watched.columns:
                step.x[column.key] = x[:count].clone()
                step.base[column.key] = bases[column.slice].clone()

    def _with_delta(self, step: Step, delta: torch.Tensor, x: torch.Tensor, output_slices: tuple[int, ...]) -> None:
        written = delta[: len(step.rows)]
        if step.mixed:
            step.written_norm[self._watched.number] = slice_norms(written, output_slices)
        deltas = written.split(list(output_slices), dim=-1)
        sampled_x = x[step.sampled] if step.sampled else None
        for column in self._watched.columns:
            rows = deltas[column.slice]
            if sampled_x is not None:
                step.samples[column.key] = sampled_x, rows[step.sampled]
            if self._capture.keeps("delta"):
                step.delta[column.key] = rows.clone()


class ShardedStandIn(StandIn):
    """The same for a fully sharded layer, which calls the kernels itself: x·Aᵀ of its own part of A or x, an exchange
    with the other ranks, and its own part of B."""

    _x: torch.Tensor | None = None
    _part: torch.Tensor | None = None

    def add_shrink(
        self, buffer: torch.Tensor, x: torch.Tensor, lora_a_stacked: tuple[torch.Tensor, ...], scale: float, **more: Any
    ) -> Any:
        """`buffer += s·x·Aᵀ`, `[slices, tokens, r]`, of this rank alone."""
        result = self._real.add_shrink(buffer, x, lora_a_stacked, scale, **more)
        if (step := self._capture.step) is not None:
            with self._capture.guard("a layer's part of x·Aᵀ"):
                self._x, self._part = x, buffer[:, step.sampled].clone() if step.sampled else None
        return result

    def add_expand(
        self,
        y: torch.Tensor,
        shrink: torch.Tensor,
        lora_b_stacked: tuple[torch.Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        **more: Any,
    ) -> Any:
        """`y[:, offset_start:] += shrink·Bᵀ`, where `shrink: [slices, tokens, r]` is that of all ranks."""
        capture, step, x = self._capture, self._capture.step, self._x
        expand, self._x = self._real.add_expand, None
        if step is None or x is None:
            return expand(y, shrink, lora_b_stacked, output_slices, offset_start, **more)
        whole = output_slices if sum(output_slices) == y.shape[-1] else (y.shape[-1],)
        with capture.guard("a layer's input"):
            self._before(step, y, x, whole)
            step.shrink[self._watched.number] = shrink.clone()
        if not capture.wants_delta(step):
            return expand(y, shrink, lora_b_stacked, output_slices, offset_start, **more)
        delta = torch.zeros_like(y)
        expand(delta, shrink, lora_b_stacked, output_slices, offset_start, **more)
        y.add_(delta)
        with capture.guard("a layer's contribution"):
            self._with_delta(step, delta[:, offset_start : offset_start + sum(output_slices)], x, output_slices)
            for column in self._watched.columns if self._part is not None else ():
                # A and B are compared one after the other: a rank does not see what the others multiply with A.
                x_of_samples, written = step.samples.pop(column.key)
                of_slice = shrink[column.slice, step.sampled]
                assert self._part is not None
                step.halves[column.key] = (x_of_samples, self._part[column.slice]), (of_slice, written)
        return y


class HeadStandIn:
    """Replaces the Punica wrapper of a head over the vocabulary."""

    def __init__(self, real: Any, number: int, capture: Recording) -> None:
        self._real, self._number, self._capture = real, number, capture

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def add_lora_logits(self, y: torch.Tensor, x: torch.Tensor, *more: Any, **kwargs: Any) -> Any:
        """`y += s·(x·Aᵀ)·Bᵀ`, with a row for each request. `y: [requests, vocabulary]`."""
        step, real = self._capture.step, self._real.add_lora_logits
        head = self._begun(step, len(x)) if step is not None else None
        if head is None or not head.sampled:
            return real(y, x, *more, **kwargs)
        delta = torch.zeros_like(y)
        result = real(delta, x, *more, **kwargs)
        y.add_(delta)
        with self._capture.guard("the contribution to logits"):
            head.x, head.delta = x[head.sampled], delta[head.sampled]
        return result

    def _begun(self, step: Step, count: int) -> Head | None:
        """The head's record in this step; None for other rows than one of each request: those of log-probabilities of
        a prompt."""
        with self._capture.guard("the input of a head"):
            columns = step.rows.columns
            if count == len(columns.names):
                sampled = sorted({int(columns.request[row]) for row in step.sampled})
                head = step.heads[self._number] = Head(request_slots(self._real, count).clone(), sampled)
                return head
        return None
