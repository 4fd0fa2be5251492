"""The rows of one step of vLLM's model runner, with what each asked for.

In: the runner while its forward pass runs, and the scheduler's output. Out: `StepRows`, in the order of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.recording import DECODE, PREFILL
from lora_probe.recording.requests import client_id


@dataclass(frozen=True)
class StepRows:
    """The rows of one step, in the order of the batch. `requests` are vLLM's own ids: two requests with one id of a
    client have two. `lora` holds vLLM's adapter ids, 0 for none."""

    requests: list[str]
    positions: list[int]
    prompt_lengths: list[int]
    lora: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def columns(self) -> RowColumns:
        """The same rows as arrays."""
        names = tuple(dict.fromkeys(self.requests))
        numbers = {name: number for number, name in enumerate(names)}
        request = np.fromiter(map(numbers.__getitem__, self.requests), np.int32, len(self))
        position = np.array(self.positions, np.int32)
        phase = np.where(position >= np.array(self.prompt_lengths, np.int32), DECODE, PREFILL).astype(np.int8)
        return RowColumns(names, request, position, phase, np.array(self.lora, np.int64))


@dataclass(frozen=True)
class RowColumns:
    """The rows of one step in columns, `[rows]` each: the number of the row's request in `names`, its position, its
    phase, and vLLM's adapter id."""

    names: tuple[str, ...]
    request: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    phase: npt.NDArray[np.int8]
    lora: npt.NDArray[np.int64]

    def runs(self) -> Iterator[tuple[str, int, int, int]]:
        """Consecutive rows of one request and phase: request, phase, number of the first row, how many."""
        kinds = self.request * 2 + self.phase
        first = np.flatnonzero(np.diff(kinds, prepend=-1))
        counts = np.diff(first, append=len(kinds))
        for row, count in zip(first.tolist(), counts.tolist(), strict=True):
            yield self.names[self.request[row]], int(self.phase[row]), row, count

    def by_request(self, rows: npt.NDArray[np.bool_]) -> dict[str, int]:
        """How many of `rows` belong to each request, for those that have any."""
        if not rows.any():
            return {}
        counts = np.bincount(self.request[rows], minlength=len(self.names))
        return {self.names[number]: int(counts[number]) for number in np.flatnonzero(counts)}


def rows_of(runner: Any, scheduler_output: Any, prepared: Any = None) -> StepRows:
    """The rows of the step that `runner` has prepared. `prepared` is the batch of the V2 runner, None on V1."""
    return v1_rows(runner, scheduler_output) if prepared is None else v2_rows(runner, prepared)


def requests_of(
    runner: Any, scheduler_output: Any, prepared: Any = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each request of the step in the order of the batch: vLLM's adapter id, 0 for none, and the number of rows."""
    if prepared is None:
        batch, scheduled = runner.input_batch, scheduler_output.num_scheduled_tokens
        counts = np.array([scheduled.get(name, 0) for name in batch.req_ids], np.int64)
        return np.array(batch.request_lora_mapping[: len(counts)], np.int64), counts
    lora = runner.lora_state.lora_ids[prepared.idx_mapping_np]
    return lora.astype(np.int64), prepared.num_scheduled_tokens.astype(np.int64)


def is_warm_up(scheduler_output: Any) -> bool:
    """Whether a step is vLLM's own: `warmup_kernels` of the V2 runner executes real steps whose requests have ids such
    as `_warmup_0_`, without the suffix that vLLM gives to the id of every client."""
    requests = scheduler_output.num_scheduled_tokens
    return bool(requests) and all(name.startswith("_") and client_id(name) == name for name in requests)


def v1_rows(runner: Any, scheduler_output: Any) -> StepRows:
    """The V1 model runner's rows while its forward pass runs.

    `input_batch` has the order of the batch; `num_scheduled_tokens` of the scheduler's output the number of rows of
    each request; `num_computed_tokens_cpu` their first position.
    """
    batch = runner.input_batch
    requests: list[str] = []
    positions: list[int] = []
    lengths: list[int] = []
    lora: list[int] = []
    for index, internal in enumerate(batch.req_ids):
        count = scheduler_output.num_scheduled_tokens.get(internal, 0)
        start = int(batch.num_computed_tokens_cpu[index])
        requests += [internal] * count
        positions += range(start, start + count)
        lengths += [int(batch.num_prompt_tokens[index])] * count
        lora += [int(batch.request_lora_mapping[index])] * count
    return StepRows(requests, positions, lengths, lora)


def v2_rows(runner: Any, batch: Any) -> StepRows:
    """The V2 model runner's rows. `batch` is the `InputBatch` that its `prepare_inputs` returned for this step.

    V2 sorts its batch anew in every step. With speculative decoding the first positions on the host are too high after
    a draft was rejected, so the positions are read from the device.
    """
    requests: list[str] = []
    positions: list[int] = []
    lengths: list[int] = []
    lora: list[int] = []
    states, adapters = runner.req_states, runner.lora_state.lora_ids
    for index, internal in enumerate(batch.req_ids):
        count, start = int(batch.num_scheduled_tokens[index]), int(batch.num_computed_tokens_np[index])
        state = int(batch.idx_mapping_np[index])
        requests += [internal] * count
        positions += range(start, start + count)
        lengths += [int(states.prompt_len.np[state])] * count
        lora += [int(adapters[state])] * count
    if batch.num_draft_tokens:
        positions = batch.positions[: len(positions)].tolist()
    return StepRows(requests, positions, lengths, lora)
