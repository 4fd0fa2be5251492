"""The vLLM engine: starts a real engine with the probe in it, sends requests, and records the answers.

In: a `RunSpec`. Out: the folders `client/` (requests) and `vllm-rank-N/` (by the workers) of a trace. Requests run
one at a time, first without and then with the adapter, so that no batch mixes them. With more adapters, each prompt
runs in one batch: without an adapter, and with each of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from lora_probe.adapter import Adapter, TrainedAs, open_adapter
from lora_probe.base import Base, EngineView
from lora_probe.engines.mixtures import BisectSpec, NextToken
from lora_probe.engines.prompts import encode, forced, texts
from lora_probe.recording import SCHEMA, NamedAdapter, Process, RequestRecord, RunSpec, Score, TraceWriter
from lora_probe_vllm import TRACE
from lora_probe_vllm.llm import (
    ENVIRONMENT,
    engine_arguments,
    generate,
    request_for,
    require_probe,
    set_environment,
    start,
)
from lora_probe_vllm.pooled import answered
from lora_probe_vllm.runners import pin_v1
from lora_probe_vllm.seams import dense_logprobs, root_cause, vllm_version, vocabulary

HEAD_ADAPTED = (
    "vLLM computes the log-probabilities of a prompt without the adapter of lm_head, or with that of a wrong row"
)
"""vLLM 0.32, `prompt_logprobs`: its logits processor has one row for each request, that of the sampled token."""

MOST_NUMBERS = 30_000_000
"""vLLM returns every log-probability of a prompt as Python objects of about 100 bytes each: 3 GB."""


class VllmEngine:
    """Entry point `vllm` of the group `lora_probe.engines`."""

    def describe(self, base: Base, trained: TrainedAs) -> EngineView:
        """See `lora_probe.engines.Engine.describe`. vLLM takes the model's class from its config, for any task."""
        set_environment()
        os.environ.pop(TRACE, None)
        from lora_probe_vllm.view import describe

        return describe(base, trained)

    def mixture(self, spec: BisectSpec, folder: Path, writer: TraceWriter) -> NextToken:
        """See `lora_probe.engines.mixtures`."""
        from lora_probe_vllm.bisect import begin

        return begin(spec, folder / "workers", writer).next_token

    def record(self, spec: RunSpec, folder: Path) -> None:
        """See `lora_probe.engines.Engine.record`."""
        set_environment()
        # The workers find everything else in the run.json there.
        os.environ[TRACE] = str(folder.resolve())
        pinned = pin_v1()
        arguments = engine_arguments(spec)
        process = Process(
            schema=SCHEMA,
            role="client",
            engine="vllm",
            rank=0,
            pid=os.getpid(),
            versions={"vllm": vllm_version()},
            keep=spec.keep,
            settings={key: value for key, value in arguments.items() if _is_json(value)},
            changed=[*_changed(arguments, bool(spec.beside)), *([pinned] if pinned is not None else [])],
        )
        with TraceWriter(folder / "client", process) as writer:
            writer.event("engine", f"starting vLLM {vllm_version()}")
            started = time.perf_counter()
            llm = start(arguments)
            writer.event("engine", "the engine is ready", seconds=round(time.perf_counter() - started, 3))
            require_probe(folder)
            if spec.adapter is None:
                ask_plain(llm, spec, writer)
            else:
                ask(llm, spec, writer)


def _changed(arguments: dict[str, Any], mixed: bool) -> list[str]:
    """How the engine that `trace` starts differs from the user's own server."""
    settings = [f"{name}={arguments.get(name)}" for name in ("enforce_eager", "enable_prefix_caching", "max_model_len")]
    order = "one batch for each prompt" if mixed else "one request at a time"
    return [*settings, order, *(f"{name}={os.environ[name]}" for name in ENVIRONMENT)]


def _is_json(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list)


def ask(llm: Any, spec: RunSpec, writer: TraceWriter, adapter_id: int = 1) -> None:
    """Run every prompt without an adapter and with each one. If vLLM refuses an adapter, only the other answers are
    recorded; that is not an error.

    The adapters are loaded first, so that the base model runs with a filled slot, as in a server. A scored run then
    scores the adapter's answers, with and without the adapter.
    """
    assert spec.adapter is not None
    prompts, adapter = encode(spec, llm.get_tokenizer()), open_adapter(spec.adapter)
    task = adapter.config.trained_as.task if llm.runner_type == "pooling" else None
    try:
        named = [NamedAdapter(spec.name, spec.adapter), *spec.beside]
        requests = [request_for(llm, adapter_id + number, one) for number, one in enumerate(named)]
        loaded = [request for request in requests if _load(llm, request, writer)]
        # A scored run scores the base model on the adapter's own answers instead.
        turns = [*([] if spec.score else [None]), *loaded]
        batches = [turns] if spec.beside else [[turn] for turn in turns]
        answers = []
        for batch in batches:
            for number, ids in enumerate(prompts):
                for turn, answer in zip(batch, _answers(llm, spec, task, number, ids, batch), strict=True):
                    writer.request(answer)
                    answers += [answer] if turn is not None else []
        if spec.score:
            unmeasured = HEAD_ADAPTED if _adapts_head(adapter) else ""
            for answer in answers:
                score = Score("", answer.prompt, "adapter", answer.prompt_ids, answer.output_ids, unmeasured)
                _score(llm, score, writer, requests[0])
                _score(llm, replace(score, kind="base"), writer)
    finally:
        llm.collective_rpc("lora_probe_finish")


def ask_plain(llm: Any, spec: RunSpec, writer: TraceWriter) -> None:
    """Score the spec's answers with a model that has no adapter."""
    try:
        for number, prompt in enumerate(spec.prompts):
            _score(llm, Score("", number, "plain", prompt.ids, forced(spec, number)), writer)
    finally:
        llm.collective_rpc("lora_probe_finish")


def _adapts_head(adapter: Adapter) -> bool:
    return any(module.module.rpartition(".")[2] == "lm_head" for module in adapter.modules)


def _load(llm: Any, request: Any, writer: TraceWriter) -> bool:
    """Add the adapter before it is used: a failure inside `generate` would kill the engine."""
    try:
        llm.llm_engine.add_lora(request)
    # The worker has recorded the refusal with vLLM's own message; here it only ends the run.
    except Exception as error:
        writer.event("refused", root_cause(error))
        return False
    return True


def _answers(
    llm: Any, spec: RunSpec, task: str | None, number: int, ids: list[int], turns: Sequence[Any]
) -> list[RequestRecord]:
    """The answers to one prompt in one batch; `turns` are the requests for adapters, None without one."""
    from vllm import SamplingParams

    if llm.runner_type == "pooling":
        return [answered(llm, task, number, ids, turn) for turn in turns]
    started, prefix = time.perf_counter(), forced(spec, number)
    parameters = SamplingParams(temperature=0, max_tokens=spec.max_tokens, logprobs=0)
    outputs = generate(llm, number, ids + prefix, parameters, turns)
    return [
        _answer(llm, number, ids, prefix, turn, output, started) for turn, output in zip(turns, outputs, strict=True)
    ]


def _answer(
    llm: Any, number: int, ids: list[int], prefix: list[int], request: Any, output: Any, started: float
) -> RequestRecord:
    answer = output.outputs[0]
    tokens = [int(token) for token in answer.token_ids]
    scores = zip(tokens, answer.logprobs or [], strict=False)
    parts = texts(prefix, tokens, llm.get_tokenizer()) if prefix else {"text": answer.text}
    return RequestRecord(
        id=str(output.request_id),
        prompt=number,
        adapter=request.lora_name if request is not None else None,
        prompt_ids=ids,
        output_ids=prefix + tokens,
        # vLLM treats forced tokens as part of the prompt and returns no number for them.
        logprobs=[None] * len(prefix) + [round(float(logprobs[token].logprob), 6) for token, logprobs in scores],
        seconds=round(time.perf_counter() - started, 3),
        **parts,
    )


def _score(llm: Any, score: Score, writer: TraceWriter, request: Any = None) -> None:
    """The prompt and all but the last token of its answer as one prompt.

    The distributions of the answer's tokens are those of this prompt's tokens, and of the token that is sampled after
    it.
    """
    from vllm import SamplingParams

    ids = score.prompt_ids + score.answer_ids[:-1]
    if len(ids) * vocabulary(llm) > MOST_NUMBERS:
        too_long = f"vLLM cannot return a vocabulary of {vocabulary(llm)} for each of {len(ids)} tokens"
        score = replace(score, unmeasured=score.unmeasured or too_long)
    wanted = None if score.unmeasured else -1
    parameters = SamplingParams(
        temperature=0, max_tokens=1, logprobs=wanted, prompt_logprobs=wanted, flat_logprobs=True, detokenize=False
    )
    (output,) = generate(llm, score.prompt, ids, parameters, [request])
    logprobs = None
    if wanted is not None:
        begin, count = len(score.prompt_ids), len(score.answer_ids)
        rows = [dense_logprobs(output.prompt_logprobs, begin + token) for token in range(count - 1)]
        logprobs = np.stack([*rows, dense_logprobs(output.outputs[0].logprobs, 0)])
    writer.score(replace(score, request=str(output.request_id)), logprobs)
