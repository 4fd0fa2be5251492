"""The PEFT engine: runs base model and adapter in PEFT, and records both.

In: a `RunSpec`. Out: the folder `peft/` of a trace. Generation is greedy, one prompt at a time, with transformers'
own key-value cache; every forward pass is a step, and its rows are the positions that it computes.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_probe.adapter import TrainedAs, open_adapter
from lora_probe.adapter.pair_values import extra_of
from lora_probe.adapter.variants import DORA
from lora_probe.base import Base, EngineView
from lora_probe.engines.load_record import LoadRecord
from lora_probe.engines.peft.activation import Activation, activation_of
from lora_probe.engines.peft.capture import Capture
from lora_probe.engines.peft.dora import why_no_formula
from lora_probe.engines.peft.loads import ActiveLoad, attach
from lora_probe.engines.peft.models import encodes, load_model, load_tokenizer, shapes_of, short
from lora_probe.engines.peft.plain import describe_model, record_plain
from lora_probe.engines.peft.runner import Runner, end_ids
from lora_probe.engines.peft.slots import has_formula, is_dora, variant
from lora_probe.engines.peft.steps import Steps
from lora_probe.engines.prompts import encode
from lora_probe.names import Key
from lora_probe.precision import coarser
from lora_probe.recording import SCHEMA, Load, Process, RequestRecord, RunSpec, TraceWriter
from lora_probe.rules.stored import expect


class PeftEngine:
    """Entry point `peft` of the group `lora_probe.engines`."""

    def __init__(self) -> None:
        import peft
        import torch
        import transformers

        self.versions = {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        }

    def describe(self, base: Base, trained: TrainedAs) -> EngineView:
        """See `lora_probe.engines.Engine.describe`."""
        from lora_probe.engines.peft.view import describe

        return describe(base, trained, self.versions["peft"])

    def record(self, spec: RunSpec, folder: Path) -> None:
        """See `lora_probe.engines.Engine.record`."""
        ignored = sorted(set(spec.options) - {"dtype", "lora_dtype"})
        process = Process(
            schema=SCHEMA,
            role="engine",
            engine="peft",
            rank=0,
            pid=os.getpid(),
            versions=self.versions,
            keep=spec.keep,
            changed=[f"--{name.replace('_', '-')} is a vLLM option and has no effect in PEFT" for name in ignored],
        )
        with TraceWriter(folder / "peft", process) as writer:
            if spec.adapter is None:
                record_plain(spec, writer)
            else:
                _record(spec, spec.adapter, writer)


def _record(spec: RunSpec, path: str, writer: TraceWriter) -> None:
    started = time.perf_counter()
    # The model first: a folder without a model must be reported as such.
    # Outputs are scored as next tokens, which only language models have.
    adapter = None if spec.score else open_adapter(path)
    model = load_model(spec.model, spec.options.get("dtype", "auto"), adapter=adapter)
    tokenizer = load_tokenizer(spec.model)
    runner = Runner(model, tokenizer, spec, end_ids(getattr(model, "generation_config", None), tokenizer), writer)
    describe_model(writer, model, spec, started)
    prompts = encode(spec, tokenizer)
    for number, ids in enumerate(() if spec.score else prompts):
        # A scored run scores the base model on the adapter's own answers instead.
        writer.request(runner.run(f"base-{number}", number, ids, None))
    load, peft_model = _load(spec, path, model, writer)
    if load is not None:
        _run_load(spec, load, peft_model, runner, prompts)


def _load(spec: RunSpec, path: str, model: Any, writer: TraceWriter) -> tuple[ActiveLoad | None, Any]:
    """Attach the adapter and judge the result: the load and PEFT's model, or None if PEFT refuses it."""
    shapes, adapter, dtype = shapes_of(model), open_adapter(path), writer.process.dtype
    expected, digest = expect(adapter, shapes), adapter.digest()
    attached = attach(model, spec, writer)
    lora_dtype = attached.lora_dtype(dtype)
    writer.describe(lora_dtype=lora_dtype)
    refused, message = attached.refused is not None, attached.refused or ""
    load = Load(0, spec.name, str(adapter.path), digest, refused=refused, message=message, said=attached.logged)
    record = LoadRecord(writer, load, adapter, expected, coarser(dtype, lora_dtype))
    record.announce({row.key: row.module for row in expected if row.module in attached.layers})
    if refused:
        return None, None
    active = ActiveLoad(record, attached.layers, shapes)
    active.judge_read()
    active.judge_slots("after loading")
    return active, attached.model


def _run_load(spec: RunSpec, load: ActiveLoad, peft_model: Any, runner: Runner, prompts: list[list[int]]) -> None:
    """Run every prompt with the adapter, record its rows, and write the last stations of the load."""
    recorded, activation = spec.keep != "events", activation_of(peft_model)
    runner = replace(runner, activation=activation)
    layers, experts = (load.recordable(), load.experts()) if recorded else ({}, {})
    answers = []
    with Capture(layers, spec.keep, spec.score, experts) as capture:
        steps = Steps(load, capture, runner.writer, in_parts=encodes(runner.model))
        for number, ids in enumerate(prompts):
            answers.append(runner.run(f"lora-{number}", number, ids, spec.name, steps))
            runner.writer.request(answers[-1])
        for answer in answers if spec.score else ():
            runner.score(f"score-lora-{answer.prompt}", "adapter", answer, steps)
    if spec.score:
        _score_base(peft_model, runner, answers)
    load.judge_slots("when the run ended")
    load.record.finish(
        lambda key: (
            _why_unmeasured(key, load, key in layers or key in experts, spec)
            or _why_inactive(activation, prompts, runner.tokenizer)
        ),
        lambda key: _why_unjudged(key, load),
    )


def _score_base(peft_model: Any, runner: Runner, answers: Sequence[RequestRecord]) -> None:
    with _without_adapter(peft_model) as changed:
        for answer in answers:
            runner.score(f"score-base-{answer.prompt}", "base", answer, unmeasured=changed)


@contextmanager
def _without_adapter(peft_model: Any) -> Iterator[str]:
    """Disable the adapter during a block. Yields PEFT's warning if this is not exactly the base (trained biases)."""
    with ExitStack() as stack:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            stack.enter_context(peft_model.disable_adapter())
        yield " ".join(short(str(warning.message)) for warning in caught)


def _why_unmeasured(key: Key, load: ActiveLoad, watched: bool, spec: RunSpec) -> str | None:
    layer = load.layers.get(key[0])
    if spec.keep == "events":
        return "contributions were not recorded (--keep events)"
    if not watched:
        kind = variant(layer) if key[1] == "weight" and hasattr(layer, "lora_variant") else None
        return f"PEFT's {kind or type(layer).__name__} layers are not recorded yet"
    return None


def _why_inactive(activation: Activation | None, prompts: Sequence[Sequence[int]], tokenizer: Any) -> str | None:
    if activation is None or any(activation.first(ids) is not None for ids in prompts):
        return None
    text = json.dumps(tokenizer.decode(activation.tokens), ensure_ascii=False)
    return f"no prompt contains the invocation of this Activated LoRA, {text}, without which PEFT runs the base model"


def _why_unjudged(key: Key, load: ActiveLoad) -> str | None:
    """Why the contribution cannot be computed from the file; None if it can."""
    layer = load.layers[key[0]]
    if is_dora(layer):
        missing = extra_of(load.pairs[key], DORA.field) is None
        return "the file has no magnitude vector to compute it from" if missing else why_no_formula(layer)
    return None if has_formula(layer) else f"PEFT runs it as {variant(layer)}, whose formula is not known"
