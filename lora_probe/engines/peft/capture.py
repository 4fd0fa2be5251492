"""Forward hooks on PEFT's LoRA `Linear` layers, active during a `with` block.

In: the live layers by their module key. Out: for each step (also a `with` block) the rows' norms and shrink, and x and
delta of sampled rows. Tensors are only used through their own methods, so this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np

from lora_probe.engines.peft.calls import AfterCall, calls, is_sum
from lora_probe.engines.peft.experts import added, is_adding
from lora_probe.engines.peft.slots import Slot
from lora_probe.engines.sampler import SAMPLED
from lora_probe.names import Key
from lora_probe.recording import PREFILL, Floats, Level, Placed, Rows
from lora_probe.recording.rows import TABLES, kept
from lora_probe.recording.sketch import SKETCH, projection

NO_EXPERTS: Mapping[Key, Any] = {}


def sketched(rows: Any) -> Floats:
    """The sketch of every row of a live tensor `[rows, width]`."""
    values: Floats = rows.detach().float().cpu().numpy()
    return values @ projection(values.shape[-1])


def _put_back(thing: Any, name: str, before: Any) -> None:
    """Restore an attribute of an object, which its class may have too."""
    if before is None:
        delattr(thing, name)
    else:
        setattr(thing, name, before)


def one_hot(tokens: Any, size: int, factor: Any = None) -> Floats:
    """`[rows, size]`: what an embedding multiplies with A, times the factor of its model's class."""
    table = np.zeros((len(tokens), size), np.float32)
    table[np.arange(len(tokens)), tokens.cpu().numpy()] = 1 if factor is None else float(factor)
    return table


@dataclass
class Step:
    """The values that the hooks captured in one forward pass over `count` positions: columns by name and module, and x
    and delta of the sampled rows. `ran` contains the modules whose contribution was computed, and `called` how many
    rows each module had."""

    sampled: list[int]
    count: int
    called: dict[Key, int] = field(default_factory=dict)
    columns: dict[str, dict[Key, Floats]] = field(default_factory=dict)
    samples: dict[Key, tuple[Floats, Floats]] = field(default_factory=dict)
    ran: set[Key] = field(default_factory=set)
    x: dict[Key, Any] = field(default_factory=dict)
    base: dict[Key, Any] = field(default_factory=dict)
    """The base outputs of embeddings."""
    looked_up: dict[Key, Any] = field(default_factory=dict)
    """The columns of A for the tokens of an embedding, `[rows, r]`."""
    decomposed: dict[Key, Any] = field(default_factory=dict)
    """What DoRA computes for an embedding: the factors of the base output, and what is added to it."""
    added: dict[Key, Floats] = field(default_factory=dict)
    """ΔW of experts, `[experts, out, in]`, of modules that ran for the first time."""

    def keep(self, name: str, key: Key, value: Any) -> None:
        # A decoder also multiplies the encoder's rows, which are not those of this pass.
        if len(value) == self.count:
            self.columns.setdefault(name, {})[key] = value.detach().float().cpu().numpy()


class Capture:
    """Hooks on the layers of `slots`. With `sketching`, their whole outputs are sketched too. Leaving the block removes
    every hook; outside of a step they capture nothing."""

    def __init__(
        self,
        slots: Mapping[Key, Slot],
        keep: Level,
        sketching: bool = False,
        experts: Mapping[Key, Slot] = NO_EXPERTS,
        sequence: int | None = None,
        alone: bool = True,
    ) -> None:
        """`sequence`: the only one of a batch whose rows are recorded. `alone`: no other adapter is active for them."""
        self.slots, self.keep, self.sketching = dict(slots), keep, sketching
        self._experts, self._compared, self._sequence = experts, set[Key](), sequence
        self._alone = alone
        self.keys = tuple(self.slots)
        self._rank = max((slot.layer.r[slot.adapter] for slot in self.slots.values()), default=0)
        self._step: Step | None = None
        self._stack = ExitStack()

    def watches(self, key: Key) -> bool:
        """Whether there are hooks on a module."""
        return key in self.slots or key in self._experts

    def __enter__(self) -> Capture:
        for key, slot in self.slots.items():
            layer = slot.layer
            hooks = [(layer.base_layer, self._after_base(key, slot.looks_up)), (layer, self._after_output(key))]
            if slot.looks_up:
                self._look_up(key, slot)
                hooks.append((layer, self._after_embedding(key, slot)))
                if slot.is_dora:
                    hooks.append((slot.magnitudes, self._after_magnitudes(key)))
            elif slot.is_dora:
                hooks += [(slot.a, self._after_a(key)), (slot.magnitudes, self._after_b(key, 1))]
            elif slot.variant is not None:
                self._stack.enter_context(calls(slot, self._after_call(key)))
            else:
                hooks += [(slot.a, self._after_a(key)), (slot.b, self._after_b(key, slot.scaling))]
            for part, hook in hooks:
                self._stack.callback(part.register_forward_hook(hook).remove)
        for key, slot in self._experts.items():
            handle = slot.layer.get_base_layer().register_forward_pre_hook(self._before_experts(key, slot.layer))
            self._stack.callback(handle.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def stepping(self, sampled: list[int], count: int) -> Iterator[Step]:
        """One forward pass over `count` positions; `sampled` contains the numbers of the rows whose x and delta are
        kept."""
        self._step = Step(sampled, count)
        try:
            yield self._step
        finally:
            self._step = None

    def rows(
        self, step: Step, request: str, positions: list[int], phases: list[int], placed: Mapping[int, Placed]
    ) -> Rows:
        """A step's rows, one for each of `positions`; all of them ran with the only load in `placed`."""
        count = len(positions)
        (load,) = placed
        return Rows(
            modules=self.keys,
            requests=(request,),
            request=np.zeros(count, np.int32),
            position=np.array(positions, np.int32),
            phase=np.array(phases, np.int8),
            load=np.full(count, load, np.int32),
            x_norm=self._stacked(step, "x_norm", count),
            base_norm=self._stacked(step, "base_norm", count),
            delta_norm=self._stacked(step, "delta_norm", count),
            output_norm=self._stacked(step, "output_norm", count),
            shrink=self._shrink(step, count) if kept("shrink", self.keep) else None,
            inner=None,
            token=None,
            sketch=self._stacked(step, "sketch", count, SKETCH) if self.sketching else None,
            placed=placed,
            served={},
            **{name: step.columns.get(name, {}) if kept(name, self.keep) else None for name in TABLES},
        )

    def _stacked(self, step: Step, name: str, count: int, *shape: int) -> Floats:
        column = step.columns.get(name, {})
        missing = np.full((count, *shape), np.nan, np.float32)
        return np.stack([column.get(key, missing) for key in self.keys], axis=1)

    def _shrink(self, step: Step, count: int) -> Floats:
        """`[rows, modules, r]`, padded with zeros to the largest rank."""
        column = step.columns.get("shrink", {})
        wide = np.full((count, len(self.keys), self._rank), np.nan, np.float32)
        for number, key in enumerate(self.keys):
            if (shrink := column.get(key)) is not None:
                wide[:, number, :] = 0
                wide[:, number, : shrink.shape[1]] = shrink
        return wide

    def _own(self, values: Any) -> Any:
        """The rows `[rows, width]` of what a layer of all sequences reads or writes, `[sequences, rows, width]`."""
        return values.flatten(0, -2) if self._sequence is None else values[self._sequence].flatten(0, -2)

    def _after_a(self, key: Key) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if (step := self._step) is not None:
                self._keep_x(step, key, args[0].flatten(0, -2), output.flatten(0, -2))

        return hook

    def _keep_x(self, step: Step, key: Key, x: Any, shrink: Any) -> None:
        step.x[key] = x
        step.keep("x_norm", key, x.detach().float().norm(dim=-1))
        if kept("shrink", self.keep):
            step.keep("shrink", key, shrink)
        if kept("x", self.keep):
            step.keep("x", key, x)

    def _after_call(self, key: Key) -> AfterCall:
        def after(x: Any, shrink: Any, delta: Any) -> None:
            if (step := self._step) is not None:
                self._keep_x(step, key, x, shrink)
                self._keep_delta(step, key, delta, lambda rows: x[rows].detach().float().cpu().numpy())

        return after

    def _after_magnitudes(self, key: Key) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if self._step is not None:
                self._step.decomposed[key] = output

        return hook

    def _after_b(self, key: Key, scaling: float) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if (step := self._step) is None:
                return
            # PEFT multiplies by the scaling after B, in the dtype of B's output; DoRA's module has done so already.
            delta = output.flatten(0, -2) * scaling
            self._keep_delta(step, key, delta, lambda rows: step.x[key][rows].detach().float().cpu().numpy())

        return hook

    def _keep_delta(self, step: Step, key: Key, delta: Any, inputs: Callable[[list[int]], Floats]) -> None:
        step.ran.add(key)
        step.keep("delta_norm", key, delta.detach().float().norm(dim=-1))
        if kept("delta", self.keep):
            step.keep("delta", key, delta)
        rows = step.sampled if len(delta) == step.count else list(range(min(len(delta), SAMPLED[PREFILL])))
        if rows:
            step.samples[key] = inputs(rows), delta[rows].detach().float().cpu().numpy()

    def _look_up(self, key: Key, slot: Slot) -> None:
        """Record the columns of A that an embedding looks up: PEFT calls a method for that, and no module."""
        layer, before = slot.layer, slot.layer.__dict__.get("_embed")
        original = layer._embed

        def embed(tokens: Any, a: Any, **options: Any) -> Any:
            columns = original(tokens, a, **options)
            # The layer looks up the columns of other adapters, too.
            if self._step is not None and a.data_ptr() == slot.weights[0].data_ptr():
                self._step.looked_up[key] = columns.flatten(0, -2)
            return columns

        layer._embed = embed
        self._stack.callback(_put_back, layer, "_embed", before)

    def _after_embedding(self, key: Key, slot: Slot) -> Any:
        layer = slot.layer

        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if (step := self._step) is None or key not in step.looked_up:
                return
            columns, base = step.looked_up[key], step.base[key]
            scale, added = step.decomposed.get(key, (None, None))
            if added is None:
                added = columns @ slot.weights[1].T * slot.scaling
            delta = added.flatten(0, -2)
            if (factor := layer._get_embed_scale()) is not None:
                delta = delta * factor.to(delta.dtype)
            if scale is not None:
                delta = (scale - 1) * base + delta
            if self._alone and not is_sum(self._own(output), base, delta):
                # PEFT added something else: what is left of it in the output is rounded to the output's size.
                delta = self._own(output) - base
            tokens = self._own(args[0].unsqueeze(-1)).flatten()
            step.keep("x_norm", key, columns.new_ones(len(tokens)))
            if kept("shrink", self.keep):
                step.keep("shrink", key, columns)
            self._keep_delta(step, key, delta, lambda rows: one_hot(tokens[rows], layer.in_features, factor))

        return hook

    def _before_experts(self, key: Key, wrapper: Any) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if (step := self._step) is None or not is_adding(wrapper):
                return
            step.ran.add(key)
            if key not in self._compared:
                self._compared.add(key)
                step.added[key] = added(wrapper)

        return hook

    def _after_base(self, key: Key, looks_up: bool) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if (step := self._step) is None:
                return
            rows = self._own(output)
            step.called[key] = len(rows)
            if looks_up:
                # In a mixed batch PEFT adds the contributions in place.
                step.base[key] = rows.clone()
            step.keep("base_norm", key, rows.detach().float().norm(dim=-1))
            if kept("base", self.keep):
                step.keep("base", key, rows)

        return hook

    def _after_output(self, key: Key) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if (step := self._step) is None:
                return
            rows = self._own(output)
            step.keep("output_norm", key, rows.detach().float().norm(dim=-1))
            if self.sketching:
                step.columns.setdefault("sketch", {})[key] = sketched(rows)

        return hook
