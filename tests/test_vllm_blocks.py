"""Which load computed each block of the KV cache: `Blocks` with vLLM's own scheduler output. No engine runs."""

from __future__ import annotations

from typing import Any

import pytest

from lora_probe.recording import Served
from lora_probe_vllm.blocks import Author, Blocks, Running

pytestmark = pytest.mark.slow
SIZE = 16
OLD, NEW, SAME = Author(0, "old"), Author(1, "new"), Author(2, "old")


def new(name: str, blocks: list[int], *more: list[int], start: int = 0, prompt: int = 40, adapter: int = 0) -> Any:
    """A request that begins, or that comes back on the V2 runner."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import NewRequestData

    lora = LoRARequest("a", adapter, "/a") if adapter else None
    return NewRequestData(name, [1] * prompt, [], None, None, (blocks, *more), start, lora)


def output(
    *began: Any, cached: Any = (), resumed: set[str] | None = None, finished: set[str] | None = None, **rows: int
) -> Any:
    """One step. `cached`: (request, first position, new blocks or None) of those that began earlier."""
    from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput

    names, starts, blocks = zip(*cached, strict=True) if cached else ((), (), ())
    groups = [None if of_request is None else (of_request,) for of_request in blocks]
    data = CachedRequestData(list(names), resumed or set(), [], {}, groups, list(starts), [0] * len(names))
    return SchedulerOutput(list(began), data, rows, sum(rows.values()), {}, {}, finished or set(), [])


def first(blocks: Blocks, step: Any, loads: dict[int, Author]) -> Running:
    (request,) = blocks.step(step, loads)
    return request


def test_blocks_of_other_weights_and_of_the_same() -> None:
    blocks = Blocks(SIZE)
    request = first(blocks, output(new("a", [1, 2, 3], adapter=1), a=40), {1: OLD})
    assert (request.served, request.other_weights) == (Served(40, 0, []), 0)
    loads = {2: NEW, 3: SAME}
    request = first(blocks, output(new("b", [1, 2, 4], start=32, adapter=2), b=8), loads)
    assert (request.served, request.other_weights) == (Served(40, 32, [0]), 32)
    request = first(blocks, output(new("c", [1, 2, 5], start=32, adapter=3), c=8), loads)
    assert (request.served, request.other_weights) == (Served(40, 32, [0]), 0)
    # A block that was freed and computed again belongs to whoever computed it last.
    blocks.step(output(new("d", [2, 1], adapter=2), d=32, finished={"a", "b", "c"}), loads)
    request = first(blocks, output(new("e", [1, 2, 6], start=32, adapter=2), e=8), loads)
    assert (request.served.cached_loads, request.other_weights) == ([1], 0)


def test_a_block_that_is_shared_in_the_step_that_computes_it() -> None:
    """vLLM shares a block as soon as it is scheduled. Before, it held what another adapter had computed."""
    blocks = Blocks(SIZE)
    loads = {1: OLD, 2: NEW}
    blocks.step(output(new("old", [1, 2], adapter=1), old=32), loads)
    blocks.step(output(new("a", [3, 2, 1], prompt=48, adapter=2), a=16, finished={"old"}), loads)
    step = output(new("b", [3, 2, 4], start=32, adapter=2), cached=[("a", 16, None)], a=32, b=8)
    request = first(blocks, step, loads)
    assert (request.served.cached_loads, request.other_weights) == ([1], 0)


def test_the_last_block_is_partly_cached() -> None:
    blocks = Blocks(SIZE)
    blocks.step(output(new("a", [1, 2], prompt=32, adapter=1), a=32), {1: OLD})
    request = first(blocks, output(new("b", [1, 2], prompt=32, start=31, adapter=2), b=1), {2: NEW})
    assert (request.served.cached, request.other_weights) == (31, 31)


def test_blocks_that_grow_while_a_request_runs() -> None:
    blocks = Blocks(SIZE)
    blocks.step(output(new("a", [1], prompt=16, adapter=1), a=10), {1: OLD})
    blocks.step(output(cached=[("a", 10, None)], a=6), {1: OLD})
    blocks.step(output(cached=[("a", 16, [7])], a=1), {1: OLD})
    request = first(blocks, output(new("b", [1, 7, 9], start=32, adapter=1), b=8), {1: OLD})
    assert request.served.cached_loads == [0]


def test_rows_of_the_base_and_of_an_adapter_without_a_slot() -> None:
    blocks = Blocks(SIZE)
    blocks.step(output(new("a", [1, 2]), new("b", [3, 4], adapter=9), a=32, b=32), {1: OLD})
    assert blocks.rows_of(9, output(a=1, b=1)) == {"b": 1}
    base, adapter = blocks.step(
        output(new("c", [1, 2, 5], start=32), new("d", [3, 4, 6], start=32, adapter=1), c=8, d=8), {1: OLD}
    )
    assert (base.served.cached_loads, base.other_weights) == ([-1], 0)
    assert (adapter.served.cached_loads, adapter.other_weights) == ([-2], 32)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_request_that_comes_back(runner: str) -> None:
    blocks = Blocks(SIZE)
    blocks.step(output(new("a", [1, 2, 3], adapter=1), a=40), {1: OLD})
    blocks.step(output(cached=[("a", 40, None)], a=1), {1: OLD})
    if runner == "V1":
        again = output(cached=[("a", 32, [1, 2, 8])], resumed={"a"}, a=9)
    else:
        again = output(new("a", [1, 2, 8], start=32, adapter=1), a=9)
    assert blocks.step(again, {1: OLD}) == []
    request = blocks.running["a"]
    assert request.served == Served(40, 0, [], 1)
    # 41 positions were computed before; the rows of this step are none of them new.
    assert (request.low, request.high, request.step) == (0, 41, (32, 41))
    assert request.blocks == [1, 2, 8]
    blocks.step(output(finished={"a"}), {1: OLD})
    assert blocks.running == {}


def test_a_request_that_ran_before_is_unknown_and_so_are_its_blocks() -> None:
    blocks = Blocks(SIZE)
    blocks.step(output(new("a", [1, 2], adapter=1), a=32), {1: OLD})
    assert blocks.step(output(cached=[("b", 100, [2])], b=1, finished={"a"}), {1: OLD}) == []
    request = first(blocks, output(new("c", [1, 2, 3], start=32, adapter=1), c=8), {1: NEW})
    assert (request.served, request.other_weights) == (Served(40, 32, None), 16)


@pytest.mark.parametrize("size", [None, SIZE])
def test_where_authors_cannot_be_known(size: int | None) -> None:
    """Several groups of caches, or none that tells the size of a block."""
    blocks = Blocks(size)
    more = [[5, 6]] if size else []
    blocks.step(output(new("a", [1, 2], *more, adapter=1), a=32), {1: OLD})
    request = first(blocks, output(new("b", [1, 2, 3], *more, start=32, adapter=2), b=8), {2: NEW})
    assert (request.served, request.other_weights) == (Served(40, 32, None), 0)


def test_blocks_behind_a_sliding_window() -> None:
    blocks = Blocks(SIZE)
    blocks.step(output(new("a", [1, 2], adapter=1), a=32), {1: OLD})
    request = first(blocks, output(new("b", [0, 2, 3], start=32, adapter=2), b=8), {2: NEW})
    assert (request.served.cached_loads, request.other_weights) == ([0], 16)
