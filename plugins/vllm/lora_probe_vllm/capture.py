"""x·A·B of each q, k and v slice while vLLM runs a step.

In: the LoRA layers of an active adapter. Out: rows for the trace, and samples of x and delta. A forward hook on the
layer captures the fused output; a stand-in for the layer's `punica_wrapper` captures x, the base output before the
contribution is added, and the shrink of every slice. It calls vLLM's own shrink and expand kernels once each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_probe.names import Key
from lora_probe.recording import Floats, Level, Placed, Rows, Served
from lora_probe.recording.rows import TABLES, kept
from lora_probe.recording.sketch import SKETCH, projection
from lora_probe_vllm.rows import StepRows
from lora_probe_vllm.seams import Patches, token_slots


@dataclass
class Column:
    """One slice of a layer with an adapter: a column of the trace."""

    key: Key
    slice: int


@dataclass
class Step:
    """One forward pass while it runs. Tensors are `[rows, ...]`, without the padding."""

    rows: StepRows
    sampled: list[int]
    mixed: bool
    """Some of its rows belong to no active load, and what the kernel writes for them is measured."""
    slots: Any = None
    shrink: dict[Key, Any] = field(default_factory=dict)
    x_norm: dict[Key, Any] = field(default_factory=dict)
    base_norm: dict[Key, Any] = field(default_factory=dict)
    output_norm: dict[Key, Any] = field(default_factory=dict)
    sketch: dict[Key, Any] = field(default_factory=dict)
    written_norm: dict[Key, Any] = field(default_factory=dict)
    samples: dict[Key, tuple[Any, Any]] = field(default_factory=dict)
    x: dict[Key, Any] = field(default_factory=dict)
    base: dict[Key, Any] = field(default_factory=dict)
    delta: dict[Key, Any] = field(default_factory=dict)


class StandIn:
    """Replaces the `punica_wrapper` of one layer: delegates everything, and records `add_lora_linear`."""

    def __init__(self, real: Any, columns: list[Column], capture: Capture) -> None:
        self._real, self._columns, self._capture = real, columns, capture

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
        count = len(step.rows)
        rank = lora_b_stacked[0].size(-1)
        # The same buffer as the kernels allocate: float32, contiguous, one slice after the other.
        shrink = torch.zeros((len(output_slices), x.size(0), rank), dtype=torch.float32, device=x.device)
        with capture.guard("a layer's input"):
            self._before(step, y, x, output_slices, count)
        self._real.add_shrink(shrink, x, lora_a_stacked, scale)
        add_inputs = kwargs.get("add_inputs", True)
        if capture.wants_delta(step):
            delta = torch.zeros_like(y)
            self._real.add_expand(delta, shrink, lora_b_stacked, output_slices, add_inputs=True)
            y.add_(delta) if add_inputs else y.copy_(delta)
            with capture.guard("a layer's contribution"):
                self._with_delta(step, delta, x, output_slices, count)
        else:
            self._real.add_expand(y, shrink, lora_b_stacked, output_slices, add_inputs=add_inputs)
        for column in self._columns:
            step.shrink[column.key] = shrink[column.slice, :count]
        return y

    def _before(self, step: Step, y: torch.Tensor, x: torch.Tensor, output_slices: tuple[int, ...], count: int) -> None:
        if step.slots is None:
            step.slots = token_slots(self._real, count).clone()
        x_norm = _norm(x[:count])
        bases = y[:count].split(list(output_slices), dim=-1)
        for column in self._columns:
            base = bases[column.slice]
            step.x_norm[column.key] = x_norm
            step.base_norm[column.key] = _norm(base)
            if kept("x", self._capture.keep):
                step.x[column.key] = x[:count].clone()
            if kept("base", self._capture.keep):
                step.base[column.key] = base.clone()

    def _with_delta(
        self, step: Step, delta: torch.Tensor, x: torch.Tensor, output_slices: tuple[int, ...], count: int
    ) -> None:
        deltas = delta[:count].split(list(output_slices), dim=-1)
        sampled_x = x[step.sampled] if step.sampled else None
        for column in self._columns:
            rows = deltas[column.slice]
            if sampled_x is not None:
                step.samples[column.key] = sampled_x, rows[step.sampled]
            if step.mixed:
                step.written_norm[column.key] = _norm(rows)
            if kept("delta", self._capture.keep):
                step.delta[column.key] = rows.clone()


def _on_host(tables: dict[Key, Any]) -> dict[Key, Floats]:
    return {key: values.float().cpu().numpy() for key, values in tables.items()}


def _norm(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)


class Capture:
    """Stand-ins and hooks on the recorded layers, from `watch` until `close`; at most one step is open."""

    def __init__(
        self, keep: Level, guard: Callable[[str], AbstractContextManager[None]], sketching: bool = False
    ) -> None:
        self.keep, self.guard, self.sketching = keep, guard, sketching
        self._step: Step | None = None
        self.bypassed: set[Key] = set()
        """Columns whose layer ran without calling the stand-in: it applies LoRA in a way that is not captured."""
        self.columns: dict[Key, Column] = {}
        self.transient = False
        """Whether stand-ins and hooks are on the layers during observed steps alone: code that vLLM compiles in between
        must not meet them."""
        self._patches = Patches()
        self._observing: Patches | None = None
        self._watched: dict[int, list[Column]] = {}
        self._layers: list[tuple[Any, list[Column]]] = []
        self._signs: dict[int, torch.Tensor] = {}

    def watch(self, key: Key, layer: Any, index: int) -> None:
        """Record slice `index` of `layer` as `key` from now on."""
        if key in self.columns:
            return
        column = self.columns[key] = Column(key, index)
        columns = self._watched.get(id(layer))
        if columns is not None:
            columns.append(column)
            return
        columns = self._watched[id(layer)] = [column]
        self._layers.append((layer, columns))
        if not self.transient or self._observing is not None:
            self._install(layer, columns)

    def _install(self, layer: Any, columns: list[Column]) -> None:
        patches = self._observing if self.transient else self._patches
        assert patches is not None
        real = layer.punica_wrapper
        layer.punica_wrapper = StandIn(real, columns, self)
        patches.callback(setattr, layer, "punica_wrapper", real)
        patches.callback(layer.register_forward_hook(self._after(columns)).remove)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """An observed step. If stand-ins are transient, they are on the layers within this block alone."""
        if not self.transient:
            yield
            return
        with Patches() as self._observing:
            try:
                with self.guard("observing a step"):
                    for layer, columns in self._layers:
                        self._install(layer, columns)
                yield
            finally:
                self._observing = None

    def watch_output(self, key: Key, layer: Any, index: int, widths: list[int]) -> None:
        """Record the output of slice `index` of a layer without LoRA; `widths` are those of all its slices."""
        self.columns[key] = Column(key, index)
        self._patches.callback(layer.register_forward_hook(self._after([self.columns[key]], widths)).remove)

    def close(self) -> None:
        """Remove every stand-in and hook."""
        self._patches.close()
        self.columns, self._watched, self._layers, self._step, self.bypassed = {}, {}, [], None, set()

    @property
    def step(self) -> Step | None:
        """The open step, if any."""
        return self._step

    @contextmanager
    def stepping(self, model: Any, begin: Callable[[], Step]) -> Iterator[None]:
        """One step of the model runner. The runner may load adapters in it, so the step that `begin` returns is only
        opened when the model is called; it is closed when the block ends."""

        def before(model: Any, args: Any) -> None:
            if self.columns:
                with self.guard("the start of a step"):
                    self._step = begin()

        handle = model.register_forward_pre_hook(before)
        try:
            yield
        finally:
            handle.remove()
            self._step = None

    def abandon(self) -> None:
        """Record nothing more of the open step, because the probe has failed."""
        self._step = None

    def wants_delta(self, step: Step) -> bool:
        """Whether this step's contribution is computed in a separate buffer before it is added."""
        return bool(step.sampled) or step.mixed or kept("delta", self.keep)

    def _after(self, columns: list[Column], widths: list[int] | None = None) -> Callable[..., None]:
        """A hook that captures the output of each slice. Without `widths` the layer is a LoRA layer, which has them."""

        def hook(layer: Any, args: Any, output: Any) -> None:
            step = self._step
            if step is None:
                return
            with self.guard("a layer's output"):
                if widths is None:
                    self.bypassed.update(column.key for column in columns if column.key not in step.shrink)
                fused = output[0] if isinstance(output, tuple) else output
                slices = widths or list(layer.output_slices)
                if sum(slices) == fused.shape[-1]:
                    parts = fused.flatten(0, -2)[: len(step.rows)].split(slices, dim=-1)
                    for column in columns:
                        rows = parts[column.slice]
                        step.output_norm[column.key] = _norm(rows)
                        if self.sketching:
                            step.sketch[column.key] = self._sketch(rows)

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
            x_norm=self._column(step.x_norm, len(loads)),
            base_norm=self._column(step.base_norm, len(loads)),
            delta_norm=stacked.delta_norm,
            output_norm=self._column(step.output_norm, len(loads)),
            shrink=stacked.shrink if kept("shrink", self.keep) else None,
            sketch=self._column(step.sketch, len(loads), SKETCH) if self.sketching else None,
            placed=placed,
            served=served,
            **{name: _on_host(getattr(step, name)) if kept(name, self.keep) else None for name in TABLES},
        )

    def _column(self, values: dict[Key, Any], count: int, *shape: int) -> Floats:
        """`[rows, modules, *shape]`: the values of the modules that ran; NaN for the others."""
        if len(values) == len(self.columns):
            # One copy to the host for all modules.
            result: Floats = torch.stack([values[key] for key in self.columns], dim=1).cpu().numpy()
            return result
        wide = np.full((count, len(self.columns), *shape), np.nan, np.float32)
        for number, key in enumerate(self.columns):
            if key in values:
                wide[:, number] = values[key].cpu().numpy()
        return wide


@dataclass(frozen=True)
class Stacked:
    """A step's shrink of all modules in one array `[rows, modules, r]`, and ‖delta‖ `[rows, modules]` from it."""

    shrink: Floats
    delta_norm: Floats
    present: list[int]
    """The numbers of the modules that ran."""


def stack(step: Step, keys: tuple[Key, ...], grams: dict[int, Any], claimed: Any = None) -> Stacked:
    """‖delta‖² = shrink·G·shrinkᵀ, one batched product for each slot that the step uses.

    For rows that are not `claimed` by a load (`[rows]`; by default those without an adapter) it is the norm that the
    kernel wrote (`step.written_norm`). If that was not measured it is zero where the shrink is zero, and NaN elsewhere.
    For rows without an adapter it must be zero.
    """
    present = [(number, key) for number, key in enumerate(keys) if key in step.shrink]
    count = len(step.rows)
    norms = np.full((count, len(keys)), np.nan, np.float32)
    if not present:
        return Stacked(np.zeros((count, len(keys), 0), np.float32), norms, [])
    shrink = torch.stack([step.shrink[key] for _, key in present])
    where = [number for number, _ in present]
    slots = step.slots
    total = torch.zeros(shrink.shape[:2], dtype=torch.float32, device=shrink.device)
    for slot, gram in grams.items():
        squares = ((shrink @ gram[where]) * shrink).sum(-1).clamp_(min=0)
        total += squares * (slots == slot)
    computed = total.sqrt_()
    own = step.rows.columns.lora != 0 if claimed is None else claimed
    if not own.all():
        # Without a measurement: nothing times B is nothing.
        unmeasured = torch.where(shrink.any(dim=-1), torch.nan, 0.0)
        written = torch.stack(
            [step.written_norm.get(key, unmeasured[number]) for number, (_, key) in enumerate(present)]
        )
        computed = torch.where(torch.as_tensor(own, device=computed.device), computed, written)
    norms[:, where] = computed.T.cpu().numpy()
    wide = np.full((count, len(keys), shrink.shape[-1]), np.nan, np.float32)
    wide[:, where] = shrink.transpose(0, 1).cpu().numpy()
    return Stacked(wide, norms, where)
