"""Which steps of a compiled engine run eager, from vLLM's own scheduler output. No engine runs."""

from __future__ import annotations

import pytest

from lora_probe.errors import ProbeError
from lora_probe_vllm.sampling import FIRST_DECODES, MAX_TOKENS, SAMPLE, ChosenSteps, sample_every

pytestmark = pytest.mark.slow

A, B = 1, 2


def output(
    new: dict[str, tuple[int | None, int]] | None = None,
    running: dict[str, int] | None = None,
    counts: dict[str, int] | None = None,
    finished: set[str] | None = None,
) -> object:
    """A step: `new` requests with their adapter and the length of their prompt; `running` ones with their position;
    `counts` are their tokens in this step, by default the whole prompt or one."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    step = SchedulerOutput.make_empty()
    for request, (adapter, length) in (new or {}).items():
        lora = LoRARequest(f"adapter-{adapter}", adapter, f"/adapters/{adapter}") if adapter is not None else None
        step.scheduled_new_reqs.append(NewRequestData(request, list(range(length)), [], None, None, ([],), 0, lora))
        step.num_scheduled_tokens[request] = length
    cached = CachedRequestData.make_empty()
    for request, position in (running or {}).items():
        cached.req_ids.append(request)
        cached.num_computed_tokens.append(position)
        step.num_scheduled_tokens[request] = 1
    step.scheduled_cached_reqs = cached
    step.num_scheduled_tokens |= counts or {}
    step.total_num_scheduled_tokens = sum(step.num_scheduled_tokens.values())
    step.finished_req_ids = finished or set()
    return step


def decodes(chosen: ChosenSteps, request: str, count: int, start: int) -> list[bool]:
    return [chosen.choose(output(running={request: start + step})) for step in range(count)]


def test_the_first_steps_of_each_adapter_are_chosen_and_then_one_in_so_many() -> None:
    chosen = ChosenSteps(10)
    assert chosen.choose(output(new={"first": (A, 5)}))
    taken = decodes(chosen, "first", 30, 5)
    assert taken[:FIRST_DECODES] == [True] * FIRST_DECODES
    assert [step for step, is_chosen in enumerate(taken) if is_chosen][FIRST_DECODES:] == [13, 23]
    # Another adapter begins anew, and a second request of the first does not.
    assert chosen.choose(output(new={"second": (B, 5)}, running={"first": 35}))
    assert not chosen.choose(output(new={"third": (A, 5)}))
    assert chosen.choose(output(running={"second": 5, "third": 5}))


def test_steps_without_an_adapter_are_not_chosen() -> None:
    chosen = ChosenSteps(2)
    assert not chosen.choose(output(new={"base": (None, 5)}))
    assert not any(decodes(chosen, "base", 9, 5))
    # The step that was due is the first one with an adapter, though its first steps were all chosen before.
    assert chosen.choose(output(new={"first": (A, 5)}))


def test_a_long_step_is_passed_by_and_counted() -> None:
    chosen = ChosenSteps(100)
    assert not chosen.choose(output(new={"long": (A, MAX_TOKENS + 1)}))
    assert chosen.too_long == 1
    assert chosen.choose(output(new={"short": (A, MAX_TOKENS)}))
    # A decode step that is too long for its other requests is not counted as one of the first either.
    assert not chosen.choose(output(running={"short": MAX_TOKENS}, counts={"long": MAX_TOKENS}))
    assert decodes(chosen, "short", FIRST_DECODES + 1, MAX_TOKENS + 1) == [True] * FIRST_DECODES + [False]


def test_a_preempted_request_of_the_v2_runner_stays_a_decode_of_its_prompt() -> None:
    chosen = ChosenSteps(1000)
    assert chosen.choose(output(new={"one": (A, 5)}))
    decodes(chosen, "one", FIRST_DECODES, 5)
    again = output(new={"one": (A, 9)})
    assert not chosen.choose(again)
    assert not chosen.choose(output(running={"one": 9}))


def test_a_finished_request_is_forgotten() -> None:
    chosen = ChosenSteps(1)
    chosen.choose(output(new={"one": (A, 5)}))
    chosen.choose(output(new={"one": (None, 5)}, finished={"one"}))
    assert not chosen.choose(output(running={"one": 5}))


def test_ranks_that_see_the_same_steps_choose_alike() -> None:
    steps = [output(new={"a": (A, 5), "b": (B, 7)}), *(output(running={"a": 5 + n, "b": 7 + n}) for n in range(50))]
    first, second = ChosenSteps(7), ChosenSteps(7)
    assert [first.choose(step) for step in steps] == [second.choose(step) for step in steps]


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SAMPLE, raising=False)
    assert sample_every() is None
    monkeypatch.setenv(SAMPLE, "200")
    assert sample_every() == 200
    for wrong in ("0", "-1", "often", "1.5"):
        monkeypatch.setenv(SAMPLE, wrong)
        with pytest.raises(ProbeError, match=f"{SAMPLE} is `{wrong}`"):
            sample_every()
