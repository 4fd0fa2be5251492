"""A vLLM engine whose modules run with the weights of either of two runs.

In: a `BisectSpec`. Out: the most likely next token for a set of modules that run as in the candidate. Both adapters are
loaded, and the workers exchange weights in the slot of the reference (`mixing.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_probe.adapter import open_adapter
from lora_probe.engines.mixtures import BisectSpec, Side
from lora_probe.errors import EngineFailed
from lora_probe.recording import NamedAdapter, TraceWriter
from lora_probe.rules.lp4_serving import MAX_RANKS
from lora_probe_vllm import KEEP, TRACE
from lora_probe_vllm.llm import engine_arguments, generate, request_for, require_probe, set_environment, start
from lora_probe_vllm.mixing import CANDIDATE_ID, REFERENCE_ID
from lora_probe_vllm.runners import pin_v1
from lora_probe_vllm.seams import root_cause, vllm_version

DEFAULT_RANK = 16
"""vLLM's own `--max-lora-rank`."""


def begin(spec: BisectSpec, folder: Path, writer: TraceWriter) -> Mixture:
    """Start an engine like that of `spec.run`, with slots for both adapters. The workers record what they load in
    `folder`.

    Raises:
        EngineFailed: vLLM does not start, refuses one of the adapters, or cannot exchange their weights.
    """
    assert spec.run is not None
    sides = spec.reference, spec.candidate
    set_environment()
    os.environ[TRACE], os.environ[KEEP] = str(folder.resolve()), "events"
    pin_v1()
    arguments = engine_arguments(spec.run) | {"model": spec.model, "enable_prefix_caching": False}
    arguments["max_loras"] = max(2, int(arguments.get("max_loras", 1)))
    arguments["max_lora_rank"] = max(int(arguments.get("max_lora_rank", DEFAULT_RANK)), *map(_needed, sides))
    arguments["max_cpu_loras"] = max(arguments["max_loras"], int(arguments.get("max_cpu_loras", 1)))
    writer.event("engine", f"starting vLLM {vllm_version()}")
    llm = start(arguments)
    require_probe(folder)
    return Mixture(llm, spec)


def _needed(side: Side) -> int:
    """The smallest --max-lora-rank of vLLM that an adapter fits into; its own rank if there is none."""
    rank = max((module.rank or 0 for module in open_adapter(side.folder).modules), default=0)
    return next((allowed for allowed in MAX_RANKS if allowed >= rank), rank)


class Mixture:
    """A live engine with both adapters in slots.

    Raises:
        EngineFailed: vLLM refuses one of them, or their weights cannot be exchanged.
    """

    def __init__(self, llm: Any, spec: BisectSpec) -> None:
        self._llm, self._ids = llm, spec.ids
        self._request = self._load(REFERENCE_ID, "reference", spec.reference)
        self._load(CANDIDATE_ID, "candidate", spec.candidate)
        as_loaded = {REFERENCE_ID: spec.reference.as_loaded, CANDIDATE_ID: spec.candidate.as_loaded}
        candidate = {"off": spec.candidate.off, "factors": spec.candidate.factors}
        self._mix([], {"changed": spec.changed, "as_loaded": as_loaded, **candidate})

    def next_token(self, changed: Sequence[str]) -> int:
        """The most likely next token if these modules run as in the candidate."""
        from vllm import SamplingParams

        self._mix(list(changed))
        parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        (output,) = generate(self._llm, 0, self._ids, parameters, [self._request])
        return int(output.outputs[0].token_ids[0])

    def _load(self, number: int, name: str, side: Side) -> Any:
        request = request_for(self._llm, number, NamedAdapter(name, side.folder))
        try:
            self._llm.llm_engine.add_lora(request)
        # vLLM may raise any exception; its message is passed on.
        except Exception as error:
            raise EngineFailed(f"vLLM refuses `{side.folder}`: {root_cause(error)}") from error
        return request

    def _mix(self, changed: list[str], settings: dict[str, Any] | None = None) -> None:
        if why := next(filter(None, self._llm.collective_rpc("lora_probe_mix", args=(changed, settings))), ""):
            raise EngineFailed(f"the weights of both runs cannot be mixed in vLLM: {why}")
