"""Requests to models that vLLM serves with its pooling runner: classifiers, taggers and embeddings.

In: an adapter, and a live `LLM`. Out: the engine arguments with which its task is served; for each prompt the labels
with their log-probabilities, none for an embedding, and a text for people.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from lora_probe.adapter import open_adapter
from lora_probe.base import open_base
from lora_probe.engines.labels import labelled
from lora_probe.errors import EngineFailed, UnreadableFile
from lora_probe.recording import RequestRecord
from lora_probe.rules.labels import labels_in
from lora_probe_vllm.seams import root_cause

LABELLING = {"SEQ_CLS": "classify", "TOKEN_CLS": "token_classify"}
"""vLLM's tasks by PEFT's."""


def arguments_for(adapter: str | Path, model: str) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that an adapter's task asks for; none for a language model's. A base without a head
    for labels becomes a classifier with as many as the adapter has."""
    opened = open_adapter(adapter)
    task = opened.config.trained_as.task
    if task == "FEATURE_EXTRACTION":
        return {"runner": "pooling", "convert": "embed"}
    if task not in LABELLING:
        return {}
    try:
        architecture = open_base(model).architecture or ""
    except UnreadableFile:
        architecture = ""
    if architecture.endswith("Classification"):
        return {"runner": "pooling"}
    labels = labels_in(opened)
    return {"runner": "pooling", "convert": "classify"} | ({"hf_overrides": {"num_labels": labels}} if labels else {})


def answered(llm: Any, task: str | None, number: int, ids: list[int], request: Any) -> RequestRecord:
    """The answer to one prompt. `task` is PEFT's.

    Raises:
        EngineFailed: with vLLM's message.
    """
    from vllm import PoolingParams

    started = time.perf_counter()
    wanted = LABELLING.get(task or "", "embed")
    # What vLLM makes of the scores depends on the base's config: they are compared as they are.
    parameters = PoolingParams(use_activation=False) if wanted != "embed" else PoolingParams()
    try:
        (output,) = llm.encode(
            [{"prompt_token_ids": ids}],
            pooling_task=wanted,
            pooling_params=parameters,
            lora_request=request,
            use_tqdm=False,
        )
    # vLLM may raise any exception.
    except Exception as error:
        raise EngineFailed(f"vLLM did not answer prompt {number + 1}: {root_cause(error)}") from error
    values = output.outputs.data.float().cpu().numpy()
    labels: list[int] = []
    logprobs: list[float | None] = []
    if wanted == "embed":
        text = f"a vector of {values.shape[-1]} numbers, the first ones {np.array2string(values[:3], precision=4)}"
    else:
        labels, logprobs, text = labelled(values, llm.model_config.hf_config.id2label)
    return RequestRecord(
        id=str(output.request_id),
        prompt=number,
        adapter=request.lora_name if request is not None else None,
        prompt_ids=ids,
        output_ids=labels,
        text=text,
        logprobs=logprobs,
        seconds=round(time.perf_counter() - started, 3),
    )
