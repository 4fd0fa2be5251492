"""The rows of one step of vLLM's model runner, with what each asked for.

In: the runner while its forward pass runs, and the scheduler's output. Out: `StepRows`, in the order of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class StepRows:
    """The rows of one step, in the order of the batch. `lora` holds vLLM's adapter ids, 0 for none."""

    requests: list[str]
    positions: list[int]
    prompt_lengths: list[int]
    lora: list[int]

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def adapters(self) -> set[int]:
        return {number for number in self.lora if number}


def rows_of(runner: Any, scheduler_output: Any, prepared: Any = None) -> StepRows:
    """The rows of the step that `runner` has prepared. `prepared` is the batch of the V2 runner, None on V1."""
    return v1_rows(runner, scheduler_output) if prepared is None else v2_rows(runner, prepared)


def is_warm_up(scheduler_output: Any) -> bool:
    """Whether a step is vLLM's own: `warmup_kernels` of the V2 runner executes real steps whose requests have ids such
    as `_warmup_0_`, without the suffix that vLLM gives to the id of every client."""
    requests = scheduler_output.num_scheduled_tokens
    return bool(requests) and all(name.startswith("_") and external_id(name) == name for name in requests)


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
        requests += [external_id(internal)] * count
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
        requests += [external_id(internal)] * count
        positions += range(start, start + count)
        lengths += [int(states.prompt_len.np[state])] * count
        lora += [int(adapters[state])] * count
    if batch.num_draft_tokens:
        positions = batch.positions[: len(positions)].tolist()
    return StepRows(requests, positions, lengths, lora)


def external_id(internal: str) -> str:
    """The id that the client uses: vLLM appends `-` and eight hexadecimal digits."""
    head, _, tail = internal.rpartition("-")
    return head if head and len(tail) == 8 and set(tail) <= set("0123456789abcdef") else internal
