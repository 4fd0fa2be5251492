"""A vLLM engine that nobody asked through `trace` and that keeps tokens: its requests are compared with PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SharedEngine, record_peft
from written import write_adapter

from lora_probe import compare, open_trace
from lora_probe.recording import Trace

pytestmark = pytest.mark.engine


def generate(engine: SharedEngine, adapter: Path, ids: list[list[int]], asked: tuple[bool, ...]) -> None:
    """Load an adapter, answer the prompts with it or for the base, each time for all of `asked`, and remove it."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    number = next(engine.numbers)
    request = LoRARequest("support", number, str(adapter))
    engine.llm.llm_engine.add_lora(request)
    prompts: list[Any] = [{"prompt_token_ids": tokens} for tokens in ids]
    parameters = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    for with_adapter in asked:
        engine.llm.generate(prompts, parameters, use_tqdm=False, lora_request=request if with_adapter else None)
    engine.llm.llm_engine.remove_lora(number)


def served(engine: SharedEngine, adapter: Path, folder: Path, ids: list[list[int]], asked: bool = True) -> Trace:
    """As a server answers: requests for the base and, unless only that was `asked`, with the adapter; no client records
    anything."""
    engine.llm.collective_rpc("lora_probe_begin", args=(str(folder), "shrink"))
    generate(engine, adapter, ids, (False, True) if asked else (False,))
    engine.llm.collective_rpc("lora_probe_finish")
    return open_trace(folder)


@pytest.fixture
def reference(adapter: Path, llama: Path, tmp_path: Path) -> Trace:
    trace: Trace = record_peft(adapter, llama, tmp_path / "peft", prompts=["hello", "how are you"], max_tokens=5)
    return trace


def prompts_of(reference: Trace) -> list[list[int]]:
    return [request.prompt_ids for request in reference.requests if request.adapter is not None]


def test_requests_are_matched_by_their_tokens(
    reference: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_PROBE_TOKENS", "1")
    trace = served(engine, adapter, tmp_path / "run", prompts_of(reference))
    assert trace.requests == ()
    assert sorted((request.adapter or "", len(request.output_ids)) for request in trace.answers) == [
        *[("", 4)] * 2,
        *[("support", 4)] * 2,
    ]
    for traces in ((reference, trace), (trace, reference)):
        comparison = compare(*traces)
        assert comparison.causes == ()
        assert comparison.verdict == "agree"
        assert [request.same_tokens for request in comparison.requests] == [4, 4]
        assert comparison.rows == sum(map(len, prompts_of(reference))) + 2 * 4


def test_the_adapter_was_not_requested(
    reference: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_PROBE_TOKENS", "1")
    trace = served(engine, adapter, tmp_path / "run", prompts_of(reference), asked=False)
    for traces in ((reference, trace), (trace, reference)):
        assert [cause.code for cause in compare(*traces).causes] == ["LP620"]


def test_without_being_asked_no_token_is_kept(
    reference: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path
) -> None:
    trace = served(engine, adapter, tmp_path / "run", prompts_of(reference))
    rows = trace.rows
    assert rows is not None
    assert rows.token is None
    assert all(facts.prompt_ids is None for facts in rows.served.values())
    assert trace.answers == ()


def test_peft_runs_what_the_server_saw(
    reference: Trace,
    engine: SharedEngine,
    adapter: Path,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LORA_PROBE_TOKENS", "1")
    monkeypatch.chdir(tmp_path)
    trace = served(engine, adapter, tmp_path / "run", prompts_of(reference))
    comparison = compare(trace, "peft", checkpoint=adapter, model=str(llama))
    assert (comparison.verdict, comparison.causes) == ("agree", ())
    assert comparison.candidate.run is not None
    assert [len(tokens) for tokens in comparison.candidate.run.spec.continuation or []] == [3, 3]


def test_a_stale_reload(
    reference: Trace,
    engine: SharedEngine,
    adapter: Path,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new version under the same name, whose slot still holds the old one; each version is compared with its own."""
    from vllm.lora.layers import MergedQKVParallelLinearWithLoRA

    monkeypatch.setenv("LORA_PROBE_TOKENS", "1")
    old = write_adapter(tmp_path / "old", llama, seed=4)
    engine.llm.collective_rpc("lora_probe_begin", args=(str(tmp_path / "run"), "shrink"))
    for folder in (old, adapter):
        generate(engine, folder, prompts_of(reference), (True,))
        # From now on slots keep what they hold.
        monkeypatch.setattr(MergedQKVParallelLinearWithLoRA, "set_lora", lambda *_: None)
        monkeypatch.setattr(MergedQKVParallelLinearWithLoRA, "reset_lora", lambda *_: None)
    engine.llm.collective_rpc("lora_probe_finish")
    trace = open_trace(tmp_path / "run")
    assert len(trace.loads) == 2
    comparison = compare(reference, trace)
    cause = comparison.causes[0]
    assert (cause.code, cause.side) == ("LP624", "candidate")
    assert "with the weights of another load of `support`" in cause.message
    of_old = record_peft(old, llama, tmp_path / "peft-old", prompts=["hello", "how are you"], max_tokens=5)
    assert compare(of_old, trace).causes == ()
