"""A·B of the experts of a mixture, for the tokens that the router sends to each of them.

In: the Punica wrapper in the context of a layer's kernels, while vLLM runs a step. Out: which experts each row was
routed to, x and delta of sampled rows for each expert, and from them the rows of `applied` and the samples of `agrees`.
There are too many experts for columns in the trace.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_probe.engines.load_record import LoadRecord
from lora_probe.names import Key
from lora_probe.recording import Floats
from lora_probe_vllm.measured import Routed, Step
from lora_probe_vllm.seams import is_divided
from lora_probe_vllm.stand_in import Recording

W2 = 1
"""The number of the projection that follows the activation among w1, w2, w3."""

Routes = Mapping[int, Mapping[tuple[int, int], Key]]
"""By the number of a recorded layer: the module of each expert and projection (0 to 2: w1, w2, w3)."""

Bools = npt.NDArray[np.bool_]


class ExpertStandIn:
    """Replaces the Punica wrapper of one layer of experts: delegates everything, and records both kernel calls."""

    def __init__(self, real: Any, layer: Any, number: int, capture: Recording) -> None:
        self._real, self._layer, self._number, self._capture = real, layer, number, capture

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def add_lora_w13(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        expert_map: torch.Tensor | None,
        *more: Any,
        **kwargs: Any,
    ) -> Any:
        """`y[:, k] += s·(x·A[e]ᵀ)·B[e]ᵀ` for the k-th expert e of each token. `y: [tokens, top_k, w1 and w3]`."""
        capture, step, real = self._capture, self._capture.step, self._real.add_lora_w13
        arguments = x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights, expert_map, *more
        # With expert parallelism these are other ranks' tokens.
        if step is None or expert_map is not None or kwargs.get("token_lora_mapping") is not None:
            return real(y, *arguments, **kwargs)
        with capture.guard("the router's choice"):
            capture.look_up_slots(step, self._real)
            step.routed[self._number] = Routed(topk_ids[: len(step.rows)].clone())

        def keep(delta: torch.Tensor) -> None:
            inputs = x[step.sampled].unsqueeze(1).expand(-1, topk_ids.shape[1], -1)
            for part, values in zip(self._parts(lora_b_stacked), delta.chunk(len(lora_b_stacked), -1), strict=True):
                step.routed[self._number].samples[part] = inputs, values

        return self._apart(step, real, y, arguments, kwargs, topk_ids.shape[1], keep)

    def add_lora_w2(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor,
        *more: Any,
        **kwargs: Any,
    ) -> Any:
        """The same for w2, times the router's weight of the expert. `x: [tokens·top_k, in]`."""
        step, real = self._capture.step, self._real.add_lora_w2
        arguments = x, lora_a_stacked, lora_b_stacked, topk_weights, *more
        if step is None or self._number not in step.routed:
            return real(y, *arguments, **kwargs)
        top_k = topk_weights.shape[-1]

        def keep(delta: torch.Tensor) -> None:
            inputs = x.view(-1, top_k, x.shape[-1])[step.sampled].float()
            weights = topk_weights.view(-1, top_k)[step.sampled].float()
            step.routed[self._number].samples[W2] = inputs * weights.unsqueeze(-1), delta

        return self._apart(step, real, y, arguments, kwargs, top_k, keep)

    def _apart(
        self,
        step: Step,
        real: Callable[..., Any],
        y: torch.Tensor,
        arguments: tuple[Any, ...],
        kwargs: dict[str, Any],
        top_k: int,
        keep: Callable[[torch.Tensor], None],
    ) -> Any:
        """Let the kernel write into a buffer of its own if rows are sampled, and `keep` theirs, `[sampled, top_k,
        out]`, before they are added."""
        # The ranks of fully sharded experts share the work of both halves of a pair, between the kernels.
        if not step.sampled or is_divided(self._layer):
            return real(y, *arguments, **kwargs)
        delta = torch.zeros_like(y)
        result = real(delta, *arguments, **kwargs | {"add_inputs": True})
        y.add_(delta) if kwargs.get("add_inputs", True) else y.copy_(delta)
        with self._capture.guard("an expert's contribution"):
            keep(delta.view(-1, top_k, delta.shape[-1])[step.sampled])
        return result

    def _parts(self, lora_b_stacked: tuple[torch.Tensor, ...]) -> list[int]:
        """Which projections the slices of a call are: some kernels want w3 before w1."""
        own = [stacked.data_ptr() for stacked in self._layer.w13_lora_b_stacked]
        return [2 * own.index(stacked.data_ptr()) for stacked in lora_b_stacked]


class RoutedRows:
    """The rows of a load at each expert. A step may use thousands of experts, so they are added up in arrays, and
    handed to the load's record twice a second."""

    def __init__(self, routes: Routes) -> None:
        self.routes = routes
        self._counts: dict[int, npt.NDArray[np.int64]] = {}
        self._due = 0.0

    def add(self, step: Step, requested: Bools, applied: Bools) -> None:
        """Rows of a step that requested the adapter, `[rows]`, and those of them that ran with it."""
        for number in self.routes.keys() & step.routed.keys():
            experts = step.routed[number].experts.cpu().numpy()
            size = 1 + max(expert for expert, _ in self.routes[number])
            # A row has an expert at most once. Another number is of an expert that the adapter does not have.
            both = [np.bincount(experts[rows].ravel(), minlength=size)[:size] for rows in (requested, applied)]
            self._counts[number] = self._counts.get(number, 0) + np.stack(both)

    def hand_over(self, record: LoadRecord, now: bool = False) -> None:
        """Count the rows in the load's record, if it is time for that, or `now`."""
        if not now and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + 0.5
        counts, self._counts = self._counts, {}
        for number, (requested, applied) in counts.items():
            of_layer = self.routes[number]
            for expert in np.flatnonzero(requested).tolist():
                # A pair of fused experts has several projections.
                keys = {of_layer[expert, part] for part in range(3) if (expert, part) in of_layer}
                record.routed(keys, int(requested[expert]), int(applied[expert]))


def sample_routed(
    step: Step, routes: Routes, rows: list[int], compare: Callable[[Key, tuple[int, int], Floats, Floats], bool]
) -> None:
    """Call `compare` with the module, its expert and projection, x and delta, for all that sampled tokens were routed
    to, until it returns False. `rows` are the numbers of an adapter's rows among the sampled ones."""
    for number, routed in step.routed.items():
        of_layer = routes.get(number, {})
        experts = routed.experts[step.sampled][rows].cpu().numpy()
        for part, samples in routed.samples.items():
            x, delta = (values[rows].float().cpu().numpy() for values in samples)
            for expert in np.unique(experts).tolist():
                key, chosen = of_layer.get((expert, part)), experts == expert
                if key is not None and not compare(key, (expert, part), x[chosen], delta[chosen]):
                    return
