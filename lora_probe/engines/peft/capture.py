"""Forward hooks on PEFT's LoRA `Linear` layers, for the length of a `with` block.

In: the live layers by their module key. Out: for each step the rows' norms and shrink, and on sampled rows x and
delta. Tensors are used through their own methods, so this file needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np

from lora_probe.adapter.spectrum import gram
from lora_probe.names import Key
from lora_probe.recording import Floats, Level, Rows
from lora_probe.recording.sketch import SKETCH, projection


def sketched(rows: Any) -> Floats:
    """The sketch of every row of a live tensor `[rows, width]`."""
    values: Floats = rows.detach().float().cpu().numpy()
    return values @ projection(values.shape[-1])


class Capture:
    """Hooks on `layers`, one adapter. With `sketching` their whole outputs are sketched as well. Leaving the block
    removes every hook."""

    def __init__(self, layers: Mapping[Key, Any], adapter_name: str, keep: Level, sketching: bool = False) -> None:
        self.layers, self.adapter_name, self.keep = dict(layers), adapter_name, keep
        self.sketching = sketching
        self.keys = tuple(self.layers)
        self.rank = max((layer.r[adapter_name] for layer in self.layers.values()), default=0)
        self.sampled: list[int] = []
        self.samples: dict[Key, tuple[Floats, Floats]] = {}
        self.ran: set[Key] = set()
        self._columns: dict[str, dict[Key, Floats]] = {}
        self._x: dict[Key, Any] = {}
        self._stack = ExitStack()
        grams = [self._gram(layer) for layer in self.layers.values()]
        self.gram = np.stack(grams) if grams else np.zeros((0, 0, 0), np.float32)

    def __enter__(self) -> Capture:
        for key, layer in self.layers.items():
            for part, hook in (
                (layer.lora_A[self.adapter_name], self._after_a(key)),
                (layer.lora_B[self.adapter_name], self._after_b(key, layer.scaling[self.adapter_name])),
                (layer.base_layer, self._after(key, "base")),
                (layer, self._after(key, "output")),
            ):
                self._stack.callback(part.register_forward_hook(hook).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def begin(self, sampled: list[int]) -> None:
        """Open a step; `sampled` are the row numbers on which x and delta are kept."""
        self.sampled, self.samples, self.ran, self._columns, self._x = sampled, {}, set(), {}, {}

    def rows(self, request: str, positions: list[int], phases: list[int], placed: tuple[str, ...]) -> Rows:
        """Close the step: its rows, one for each of `positions`."""
        count = len(positions)
        wanted_shrink = self.keep in ("shrink", "tensors")
        tensors = None
        if self.keep == "tensors":
            tensors = {
                f"{what}/{number}": self._columns[what][key]
                for what in ("x", "base", "delta")
                for number, key in enumerate(self.keys)
                if key in self._columns.get(what, {})
            }
        return Rows(
            modules=self.keys,
            requests=(request,),
            request=np.zeros(count, np.int32),
            position=np.array(positions, np.int32),
            phase=np.array(phases, np.int8),
            load=np.zeros(count, np.int32),
            x_norm=self._stacked("x_norm", count),
            base_norm=self._stacked("base_norm", count),
            delta_norm=self._stacked("delta_norm", count),
            output_norm=self._stacked("output_norm", count),
            shrink=self._shrink(count) if wanted_shrink else None,
            sketch=self._sketches(count) if self.sketching else None,
            gram=self.gram if wanted_shrink else None,
            placed=placed,
            tensors=tensors,
        )

    def _gram(self, layer: Any) -> Floats:
        weight = layer.lora_B[self.adapter_name].weight.detach().float().cpu().numpy()
        rank = weight.shape[1]
        wide = np.zeros((self.rank, self.rank), np.float32)
        wide[:rank, :rank] = gram(weight, layer.scaling[self.adapter_name])
        return wide

    def _stacked(self, name: str, count: int) -> Floats:
        column = self._columns.get(name, {})
        missing = np.full(count, np.nan, np.float32)
        return np.stack([column.get(key, missing) for key in self.keys], axis=1)

    def _shrink(self, count: int) -> Floats:
        wide = np.full((count, len(self.keys), self.rank), np.nan, np.float32)
        for number, key in enumerate(self.keys):
            if (shrink := self._columns.get("shrink", {}).get(key)) is not None:
                wide[:, number, :] = 0
                wide[:, number, : shrink.shape[1]] = shrink
        return wide

    def _sketches(self, count: int) -> Floats:
        column = self._columns.get("sketch", {})
        missing = np.full((count, SKETCH), np.nan, np.float32)
        return np.stack([column.get(key, missing) for key in self.keys], axis=1)

    def _keep(self, name: str, key: Key, value: Any) -> None:
        self._columns.setdefault(name, {})[key] = value.detach().float().cpu().numpy()

    def _after_a(self, key: Key) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            x = args[0].flatten(0, -2)
            self._x[key] = x
            self._keep("x_norm", key, x.detach().float().norm(dim=-1))
            if self.keep in ("shrink", "tensors"):
                self._keep("shrink", key, output.flatten(0, -2))
            if self.keep == "tensors":
                self._keep("x", key, x)

        return hook

    def _after_b(self, key: Key, scaling: float) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            # PEFT multiplies by the scaling after B, in the dtype of B's output.
            delta = output.flatten(0, -2) * scaling
            self.ran.add(key)
            self._keep("delta_norm", key, delta.detach().float().norm(dim=-1))
            if self.keep == "tensors":
                self._keep("delta", key, delta)
            if self.sampled:
                x = self._x[key][self.sampled].detach().float().cpu().numpy()
                self.samples[key] = x, delta[self.sampled].detach().float().cpu().numpy()

        return hook

    def _after(self, key: Key, what: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            rows = output.flatten(0, -2)
            self._keep(f"{what}_norm", key, rows.detach().float().norm(dim=-1))
            if what == "base" and self.keep == "tensors":
                self._keep("base", key, rows)
            if what == "output" and self.sketching:
                self._columns.setdefault("sketch", {})[key] = sketched(rows)

        return hook
