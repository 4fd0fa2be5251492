"""Tokens per second with and without the adapter, with and without the probe, in vLLM and in PEFT.

Each round answers the same prompts with the same number of tokens. Each mode checks that it measures the right thing:
that the tokens were generated, that the adapter changed them, that rows were recorded. Only one vLLM engine is alive at
a time; modes that share an engine differ only in their requests.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Settings, Speeds

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

ROUNDS = 5
Ask = Callable[[Any], list[tuple[int, ...]]]


@contextmanager
def vllm_engine(settings: Settings, lora: bool, trace: Path | None = None) -> Iterator[Any]:
    """An engine in this process, with the probe armed if `trace` is passed."""
    if trace is not None:
        os.environ["LORA_PROBE_TRACE"] = str(trace)
    import vllm.plugins
    from vllm import LLM

    # A process loads its plugins only once, but an armed engine has to load them again.
    vllm.plugins.plugins_loaded = False
    llm = LLM(
        model=settings.model,
        dtype=settings.dtype,
        enable_lora=lora,
        max_lora_rank=settings.max_rank,
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=settings.batch,
    )
    os.environ.pop("LORA_PROBE_TRACE", None)
    try:
        yield llm
    finally:
        if trace is not None:
            from lora_probe_vllm.patching import disarm

            disarm()
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def asker(llm: Any, settings: Settings) -> Ask:
    """A function that answers one batch, with or without a LoRARequest, and returns the token ids."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=settings.tokens, ignore_eos=True)

    def ask(request: Any) -> list[tuple[int, ...]]:
        prompts = [settings.prompt] * settings.batch
        outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=request)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    return ask


def lora_request(settings: Settings, number: int = 1) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("bench", number, settings.adapter)


def measure(
    benchmark: Any, speeds: Speeds, settings: Settings, mode: str, run: Callable[[], Any], against: str | None = None
) -> list[tuple[int, ...]]:
    """Time `run`, check that it generated all tokens, and store the speed."""
    answers: list[tuple[int, ...]] = benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    assert len(answers) == settings.batch
    assert {len(answer) for answer in answers} == {settings.tokens}
    generated = settings.batch * settings.tokens
    speeds.measured[mode] = generated / benchmark.stats.stats.median
    if against is not None:
        speeds.against[mode] = against
    benchmark.extra_info.update(mode=mode, tokens_per_second=speeds.measured[mode], batch=settings.batch)
    return answers


def test_vllm_without_lora(benchmark: Any, speeds: Speeds, settings: Settings) -> None:
    with vllm_engine(settings, lora=False) as llm:
        ask = asker(llm, settings)
        measure(benchmark, speeds, settings, "vllm, no LoRA", lambda: ask(None))


def test_vllm_with_the_probe_idle(benchmark: Any, speeds: Speeds, settings: Settings) -> None:
    """The plugin is installed but not activated: the cost for every server."""
    with vllm_engine(settings, lora=True) as llm:
        ask, request = asker(llm, settings), lora_request(settings)
        llm.llm_engine.add_lora(request)
        base = ask(None)
        name = "vllm, adapter, probe idle"
        answers = measure(benchmark, speeds, settings, name, lambda: ask(request), "vllm, no LoRA")
        assert answers != base, "the adapter changed no token"


@pytest.fixture(scope="module")
def armed(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Ask]]:
    folder = tmp_path_factory.mktemp("armed") / "first.lptrace"
    with vllm_engine(settings, lora=True, trace=folder) as llm:
        llm.collective_rpc("lora_probe_finish")
        yield llm, asker(llm, settings)


def test_vllm_armed_but_not_recording(benchmark: Any, speeds: Speeds, settings: Settings, armed: Any) -> None:
    llm, ask = armed
    request = lora_request(settings)
    llm.llm_engine.add_lora(request)
    name = "vllm, adapter, armed, not recording"
    measure(benchmark, speeds, settings, name, lambda: ask(request), "vllm, adapter, probe idle")
    llm.llm_engine.remove_lora(1)


@pytest.mark.parametrize("keep", ["norms", "shrink", "tensors"])
def test_vllm_recording(
    benchmark: Any, speeds: Speeds, settings: Settings, armed: Any, tmp_path: Path, keep: str
) -> None:
    from lora_probe import open_trace

    llm, ask = armed
    request = lora_request(settings)
    plain_base = ask(None)
    llm.collective_rpc("lora_probe_begin", args=(str(tmp_path / "run.lptrace"), keep))
    llm.llm_engine.add_lora(request)
    name = f"vllm, adapter, recording {keep}"
    answers = measure(benchmark, speeds, settings, name, lambda: ask(request), "vllm, adapter, probe idle")
    llm.collective_rpc("lora_probe_finish")
    llm.llm_engine.remove_lora(1)
    assert answers != plain_base, "the adapter changed no token"
    trace = open_trace(tmp_path / "run.lptrace")
    ((_, ledger),) = trace.loads
    assert ledger.healthy, "the adapter did not take effect"
    assert trace.rows is not None
    assert len(trace.rows) >= ROUNDS * settings.batch * settings.tokens


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_peft(benchmark: Any, speeds: Speeds, settings: Settings, merged: bool) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))
    inputs = tokenizer([settings.prompt] * settings.batch, return_tensors="pt")
    length = inputs.input_ids.shape[1]

    def ask() -> list[tuple[int, ...]]:
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=settings.tokens,
                max_new_tokens=settings.tokens,
                pad_token_id=tokenizer.eos_token_id,
            )
        return [tuple(row[length:].tolist()) for row in output]

    base = ask()
    model = PeftModel.from_pretrained(model, settings.adapter)
    if merged:
        model = model.merge_and_unload()
    name = f"peft, adapter, {'merged' if merged else 'unmerged'}"
    answers = measure(benchmark, speeds, settings, name, ask, "peft, adapter, unmerged" if merged else None)
    assert answers != base, "the adapter changed no token"
