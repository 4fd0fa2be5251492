"""A run of a model without an adapter in the PEFT engine: it scores existing answers and records outputs of modules.

In: a plain `RunSpec` (whole answers in `continuation`, module paths in `watch`). Out: next-token distributions, and
rows with the outputs of those modules.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np

from lora_probe.engines.peft.capture import sketched
from lora_probe.engines.peft.models import dtype_of, load_model, next_logprobs
from lora_probe.engines.prompts import forced
from lora_probe.names import Key
from lora_probe.recording import DECODE, PREFILL, Floats, Rows, RunSpec, Score, TraceWriter
from lora_probe.recording.rows import output_rows
from lora_probe.recording.sketch import SKETCH


class Outputs:
    """Hooks on `modules`. Leaving the block removes every hook."""

    def __init__(self, modules: Mapping[Key, Any]) -> None:
        self.modules = dict(modules)
        self._outputs: dict[Key, tuple[Floats, Floats]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Outputs:
        for key, module in self.modules.items():
            self._stack.callback(module.register_forward_hook(self._after(key)).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _after(self, key: Key) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            rows = output.flatten(0, -2)
            self._outputs[key] = rows.detach().float().norm(dim=-1).cpu().numpy(), sketched(rows)

        return hook

    def rows(self, request: str, count: int, prompt: int) -> Rows:
        """The rows of a pass over `count` positions; the first `prompt` of them are the prompt's."""
        keys = tuple(self.modules)
        norm = np.full((count, len(keys)), np.nan, np.float32)
        sketch = np.full((count, len(keys), SKETCH), np.nan, np.float32)
        for number, key in enumerate(keys):
            if key in self._outputs:
                norm[:, number], sketch[:, number] = self._outputs[key]
        self._outputs = {}
        phases = [PREFILL if at < prompt else DECODE for at in range(count)]
        return output_rows(keys, request, phases, norm, sketch)


def record_plain(spec: RunSpec, writer: TraceWriter) -> None:
    """Score every answer of the spec. An event reports how many of the modules this model has.

    Raises:
        EngineFailed: transformers cannot load the model.
    """
    import torch

    started = time.perf_counter()
    model = load_model(spec.model, spec.options.get("dtype", "auto"), "model")
    describe_model(writer, model, spec, started)
    here = dict(model.named_modules())
    watched: dict[Key, Any] = {(name, "weight", None): here[name] for name in spec.watch if name in here}
    writer.event("watch", f"recording the outputs of {len(watched)} of {len(spec.watch)} modules")
    with Outputs(watched) as outputs, torch.inference_mode():
        for number, prompt in enumerate(spec.prompts):
            answer, request = forced(spec, number), f"plain-{number}"
            feed = prompt.ids + answer[:-1]
            result = model(input_ids=torch.tensor([feed], device=model.device), use_cache=False)
            if watched:
                writer.rows(outputs.rows(request, len(feed), len(prompt.ids)))
            logprobs = next_logprobs(result.logits, len(answer))
            writer.score(Score(request, number, "plain", prompt.ids, answer), logprobs)


def describe_model(writer: TraceWriter, model: Any, spec: RunSpec, started: float) -> None:
    """Record which model is loaded, on which device and in which dtype; `started` is when loading began."""
    dtype = dtype_of(model)
    writer.describe(device=str(model.device), dtype=dtype, settings=dict(spec.options))
    writer.event(
        "model",
        f"{type(model).__name__} loaded, {dtype} on {model.device}",
        seconds=round(time.perf_counter() - started, 3),
    )
