"""x·A·B of each q, k and v slice while vLLM runs a step.

In: the LoRA layers of an active adapter. Out: rows for the trace, and samples of x and delta. A forward hook on the
layer captures the fused output, and a stand-in for the layer's `punica_wrapper` everything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_probe.names import Key
from lora_probe.recording import Floats, Level, Placed, Rows, Served
from lora_probe.recording.rows import TABLES, kept
from lora_probe.recording.sketch import SKETCH, projection
from lora_probe_vllm.experts import ExpertStandIn
from lora_probe_vllm.measured import Column, Columns, Stacked, Step, slice_norms, without_padding
from lora_probe_vllm.seams import Patches, expert_context, is_fully_sharded, token_slots
from lora_probe_vllm.stand_in import HeadStandIn, ShardedStandIn, StandIn, Watched


def _inner(step: Step, watched: Watched, output: torch.Tensor) -> torch.Tensor:
    """⟨output, delta⟩ of each row, where `output: [rows, out]` is the sum over all ranks and delta this rank's share of
    the contribution: ⟨output, shrink·Bᵀ⟩ = ⟨output·B, shrink⟩."""
    shrink = step.shrink[watched.number][0, : len(step.rows)]
    total = torch.zeros(len(step.rows), dtype=torch.float32, device=output.device)
    for slot in step.active:
        b = watched.layer.lora_b_stacked[0][slot, 0].float()
        # A fully sharded rank adds to its part of the output alone.
        first = watched.layer.tp_rank * len(b) if len(b) < output.shape[-1] else 0
        part = output[:, first : first + len(b)].float()
        total += ((part @ b) * shrink).sum(-1) * (step.slots == slot)
    return total


TOKENS = "LORA_PROBE_TOKENS"


def keeps_tokens() -> bool:
    """Whether the trace shall contain the tokens of requests: only if the user asked for it."""
    return os.environ.get(TOKENS, "") not in ("", "0")


def _one_hot(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """`[rows, size]`: what an embedding multiplies with A."""
    return torch.nn.functional.one_hot(tokens.long(), size).float()


def _on_host(tables: dict[Key, Any]) -> dict[Key, Floats]:
    return {key: values.float().cpu().numpy() for key, values in tables.items()}


class Capture:
    """Stand-ins and hooks on the recorded layers, from `watch` until `close`; at most one step is open."""

    def __init__(
        self, keep: Level, guard: Callable[[str], AbstractContextManager[None]], sketching: bool = False
    ) -> None:
        self.keep, self.guard, self.sketching = keep, guard, sketching
        self._step: Step | None = None
        self.bypassed: set[Key] = set()
        """Columns whose layer ran without calling the stand-in: it applies LoRA in a way that is not captured."""
        self._bypassed_experts: set[int] = set()
        """The numbers of layers of experts that ran in such a way."""
        self.columns: dict[Key, Column] = {}
        self.arranged = Columns(())
        """The same columns, which turn the measurements of a step into rows."""
        self.transient = False
        """Whether stand-ins and hooks are on the layers during observed steps alone: code that vLLM compiles in between
        must not meet them."""
        self._patches = Patches()
        self._observing: Patches | None = None
        self._watched: dict[int, Watched] = {}
        self._kept = {name for name in TABLES if kept(name, keep)}
        self._signs: dict[int, torch.Tensor] = {}
        self._keeps_tokens = keeps_tokens()

    def watch(self, key: Key, layer: Any, index: int, partial: bool = False, embeds: bool = False) -> None:
        """Record slice `index` of `layer` as `key` from now on. `partial`: a rank has only part of its input.
        `embeds`: its input are token ids."""
        if key not in self.columns:
            watched, is_new = self._column(key, layer, index)
            watched.partial, watched.embeds = partial, embeds
            if is_new and (not self.transient or self._observing is not None):
                self._install(watched)

    def watch_whole(self, layer: Any, routes: bool = False, samples: bool = False) -> int:
        """Record a layer without columns from now on: one that `routes` or `samples`. Returns its number."""
        is_new = id(layer) not in self._watched
        watched = self._watched.setdefault(
            id(layer), Watched(layer, len(self._watched), routes=routes, samples=samples)
        )
        if is_new and (not self.transient or self._observing is not None):
            self._install(watched)
        return watched.number

    def why_no_experts(self, layer: Any) -> str | None:
        """Why nothing of a layer of experts was recorded; None if its kernels called the stand-in whenever it ran."""
        watched = self._watched.get(id(layer))
        if watched is None:
            return "the adapter never got a slot"
        if watched.number in self._bypassed_experts:
            return "the kernels of these experts apply LoRA in a way that is not captured yet"
        return None

    def watch_output(self, key: Key, layer: Any, index: int, widths: list[int]) -> None:
        """Record the output of slice `index` of a layer without LoRA; `widths` are those of all its slices."""
        watched, is_new = self._column(key, layer, index)
        if is_new:
            watched.widths = widths
            self._patches.callback(layer.register_forward_hook(self._after(watched)).remove)

    def _column(self, key: Key, layer: Any, index: int) -> tuple[Watched, bool]:
        """Add a column. Returns its layer, and whether it is the layer's first one."""
        is_new = id(layer) not in self._watched
        watched = self._watched.setdefault(id(layer), Watched(layer, len(self._watched)))
        column = self.columns[key] = Column(key, watched.number, index)
        watched.columns.append(column)
        self.arranged = Columns(self.columns.values())
        return watched, is_new

    def _install(self, watched: Watched) -> None:
        patches = self._observing if self.transient else self._patches
        assert patches is not None
        layer = watched.layer
        if watched.routes:
            context = expert_context(layer)
            patches.callback(setattr, context, "punica_wrapper", context.punica_wrapper)
            context.punica_wrapper = ExpertStandIn(context.punica_wrapper, layer, watched.number, self)
            patches.callback(layer.register_forward_hook(self._after_experts(watched)).remove)
            return
        real = layer.punica_wrapper
        if watched.samples:
            layer.punica_wrapper = HeadStandIn(real, watched.number, self)
            patches.callback(setattr, layer, "punica_wrapper", real)
            return
        kind = ShardedStandIn if is_fully_sharded(layer) else StandIn
        layer.punica_wrapper = kind(real, watched, self)
        patches.callback(setattr, layer, "punica_wrapper", real)
        patches.callback(layer.register_forward_hook(self._after(watched)).remove)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """An observed step. If stand-ins are transient, they are on the layers within this block alone."""
        if not self.transient:
            yield
            return
        with Patches() as self._observing:
            try:
                with self.guard("observing a step"):
                    for watched in self._watched.values():
                        self._install(watched)
                yield
            finally:
                self._observing = None

    def close(self) -> None:
        """Remove every stand-in and hook."""
        self._patches.close()
        self.columns, self._watched, self._step, self.bypassed = {}, {}, None, set()
        self._bypassed_experts = set()
        self.arranged = Columns(())

    @property
    def step(self) -> Step | None:
        """The open step, if any."""
        return self._step

    @contextmanager
    def stepping(self, model: Any, begin: Callable[[], Step]) -> Iterator[None]:
        """One step of the model runner. The runner may load adapters in it, so the step that `begin` returns is only
        opened when the model is called; it is closed when the block ends."""

        def before(model: Any, args: Any, kwargs: Any) -> None:
            if self._watched:
                with self.guard("the start of a step"):
                    step = self._step = begin()
                    if self._keeps_tokens and (ids := kwargs.get("input_ids")) is not None:
                        step.tokens = ids[: len(step.rows)].clone()

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
            self._step = None

    @contextmanager
    def reopened(self, step: Step) -> Iterator[None]:
        """Go on with a step whose model has been called, while its logits are computed."""
        self._step = step
        try:
            yield
        finally:
            self._step = None

    def abandon(self) -> None:
        """Record nothing more of the open step, because the probe has failed."""
        self._step = None

    def wants_delta(self, step: Step) -> bool:
        """Whether this step's contribution is computed in a separate buffer before it is added."""
        return bool(step.sampled) or step.mixed or self.keeps("delta")

    @property
    def embeds(self) -> bool:
        """Whether an embedding is recorded, of which a shrink of zero proves nothing."""
        return any(watched.embeds for watched in self._watched.values())

    def look_up_slots(self, step: Step, punica: Any) -> None:
        """Which slot vLLM's table has for each row, once in a step."""
        if step.slots is None:
            step.slots = token_slots(punica, len(step.rows)).clone()

    def keeps(self, table: str) -> bool:
        """Whether the level keeps a table of single modules."""
        return table in self._kept

    def _after(self, watched: Watched) -> Callable[..., None]:
        """A hook that captures the output of a layer."""

        def hook(layer: Any, args: Any, output: Any) -> None:
            step = self._step
            if step is None:
                return
            with self.guard("a layer's output"):
                if watched.widths is None and watched.number not in step.shrink:
                    self.bypassed.update(column.key for column in watched.columns)
                fused = output[0] if isinstance(output, tuple) else output
                if watched.embeds and (samples := [c.key for c in watched.columns if c.key in step.samples]):
                    tokens = _one_hot(args[0][step.sampled], layer.org_vocab_size)
                    step.samples |= {key: (tokens, step.samples[key][1]) for key in samples}
                widths = watched.widths or step.widths.get(watched.number) or layer.output_slices
                if sum(widths) == fused.shape[-1]:
                    rows = without_padding(fused if fused.dim() == 2 else fused.flatten(0, -2), len(step.rows))
                    step.widths[watched.number] = widths
                    step.output_norm[watched.number] = slice_norms(rows, widths)
                    if watched.partial and watched.number in step.shrink:
                        step.inner[watched.number] = _inner(step, watched, rows)
                    if self.sketching:
                        parts = rows.split(list(widths), dim=-1)
                        step.sketch |= {column.key: self._sketch(parts[column.slice]) for column in watched.columns}

        return hook

    def _after_experts(self, watched: Watched) -> Callable[..., None]:
        """A hook that notices experts whose kernels did not call the stand-in."""

        def hook(layer: Any, args: Any, output: Any) -> None:
            if self._step is not None and watched.number not in self._step.routed:
                self._bypassed_experts.add(watched.number)

        return hook

    def _sketch(self, rows: torch.Tensor) -> torch.Tensor:
        width = rows.shape[-1]
        if width not in self._signs:
            self._signs[width] = torch.tensor(projection(width), device=rows.device)
        return rows.float() @ self._signs[width]

    def rows(
        self,
        step: Step,
        loads: npt.NDArray[np.int32],
        placed: Mapping[int, Placed],
        stacked: Stacked,
        served: Mapping[str, Served],
    ) -> Rows:
        """The step's rows for the trace. `loads: [rows]`; `placed` contains the weights of each of these loads, and
        `served` how each request was served."""
        columns = step.rows.columns
        return Rows(
            modules=tuple(self.columns),
            requests=columns.names,
            request=columns.request,
            position=columns.position,
            phase=columns.phase,
            load=loads,
            x_norm=self.arranged.of_layers(step.x_norm, step),
            base_norm=self.arranged.norms(step.base_norm, step),
            delta_norm=stacked.delta_norm,
            output_norm=self.arranged.norms(step.output_norm, step),
            shrink=stacked.shrink if kept("shrink", self.keep) else None,
            token=None if step.tokens is None else step.tokens.cpu().numpy().astype(np.int32),
            inner=self.arranged.of_layers(step.inner, step) if any(w.partial for w in self._watched.values()) else None,
            sketch=self.arranged.of_modules(step.sketch, len(loads), SKETCH) if self.sketching else None,
            placed=placed,
            served=served,
            **{name: _on_host(getattr(step, name)) if self.keeps(name) else None for name in TABLES},
        )
