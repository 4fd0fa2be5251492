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

import msgspec

from lora_probe.adapter import TrainedAs, open_adapter
from lora_probe.adapter.pair_values import extra_of
from lora_probe.adapter.variants import DORA
from lora_probe.base import Base, EngineView, Shapes
from lora_probe.engines.load_record import LoadRecord
from lora_probe.engines.mixtures import BisectSpec, NextToken
from lora_probe.engines.peft.activation import Activation, activation_of
from lora_probe.engines.peft.batch import Lane, run_batch
from lora_probe.engines.peft.capture import Capture
from lora_probe.engines.peft.dora import why_no_formula
from lora_probe.engines.peft.loads import ActiveLoad, attach
from lora_probe.engines.peft.models import encodes, first_lines, generates, load_model, load_tokenizer, shapes_of, short
from lora_probe.engines.peft.plain import describe_model, record_plain
from lora_probe.engines.peft.runner import Runner, end_ids
from lora_probe.engines.peft.steps import Steps, Together
from lora_probe.engines.prompts import encode
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.names import Key
from lora_probe.precision import coarser
from lora_probe.recording import SCHEMA, Load, NamedAdapter, Process, RequestRecord, RunSpec, TraceWriter
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

    def mixture(self, spec: BisectSpec, folder: Path, writer: TraceWriter) -> NextToken:
        """See `lora_probe.engines.mixtures`."""
        from lora_probe.engines.peft.bisect import Mixture

        return Mixture(spec).next_token

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
    if spec.beside and (not generates(model) or encodes(model)):
        raise ProbeError(f"{type(model).__name__} runs one adapter at a time", "remove --beside")
    prompts, mixed = encode(spec, tokenizer), _is_mixed(spec)
    for number, ids in enumerate(() if spec.score or mixed else prompts):
        # A scored run scores the base model on the adapter's own answers instead.
        writer.request(runner.run(f"base-{number}", number, ids, None))
    loads = _load_all(spec, [NamedAdapter(spec.name, path), *spec.beside], model, writer)
    if loads:
        _run_loads(spec, loads, runner, prompts)


def _is_mixed(spec: RunSpec) -> bool:
    """Whether each prompt runs in one batch of the base and all adapters."""
    return bool(spec.beside) and not spec.together


def _load_all(spec: RunSpec, adapters: Sequence[NamedAdapter], model: Any, writer: TraceWriter) -> list[ActiveLoad]:
    """Attach the adapters to a base model and judge the results; those that PEFT refuses are left out.

    Raises:
        EngineFailed: PEFT refuses the first of several, which leaves layers of it in the base model.
    """
    shapes, loads = shapes_of(model), list[ActiveLoad]()
    for number, named in enumerate(adapters):
        load = _load(spec, named, shapes, model, writer, number)
        if load is not None:
            loads.append(load)
            model = load.model
        elif number == 0 and len(adapters) > 1:
            raise EngineFailed(f"PEFT refuses the first adapter, `{named.name}`", "trace it alone to see why")
    return loads


def _load(
    spec: RunSpec, named: NamedAdapter, shapes: Shapes, model: Any, writer: TraceWriter, number: int
) -> ActiveLoad | None:
    """Attach adapter `number` to a base model, whose modules have `shapes`, or to one that has the adapters before."""
    adapter, dtype = open_adapter(named.path), writer.process.dtype
    expected, digest = expect(adapter, shapes), adapter.digest()
    attached = attach(model, named, spec, writer, number)
    lora_dtype = attached.lora_dtype(dtype)
    writer.describe(lora_dtype=lora_dtype)
    refused, message = attached.refused is not None, attached.refused or ""
    load = Load(number, named.name, str(adapter.path), digest, refused=refused, message=message, said=attached.logged)
    record = LoadRecord(writer, load, adapter, expected, coarser(dtype, lora_dtype))
    record.announce({row.key: row.module for row in expected if row.module in attached.slots})
    if refused:
        return None
    active = ActiveLoad(record, attached.model, attached.slots, shapes)
    active.judge_read()
    active.judge_slots("after loading")
    return active


def _run_loads(spec: RunSpec, loads: Sequence[ActiveLoad], runner: Runner, prompts: list[list[int]]) -> None:
    """Run every prompt with the adapters, record their rows, and write the last stations of each load."""
    activations = [activation_of(load.model, load.called) for load in loads]
    if spec.together:
        if any(activations):
            raise ProbeError("PEFT runs Activated LoRA by itself", "remove --together, or that adapter")
        try:
            loads[0].model.base_model.set_adapter([load.called for load in loads])
        except ValueError as error:
            raise EngineFailed(f"PEFT cannot activate these adapters together: {first_lines(error)}") from error
    captures: list[Capture] = []
    with ExitStack() as stack:
        for number, load in enumerate(loads):
            slots, experts = (load.recordable(), load.experts()) if spec.keep != "events" else ({}, {})
            own = number + 1 if _is_mixed(spec) else None
            capture = Capture(slots, spec.keep, spec.score, experts, sequence=own, alone=not spec.together)
            captures.append(stack.enter_context(capture))
        in_parts = encodes(runner.model)
        steps = [Steps(load, held, runner.writer, in_parts) for load, held in zip(loads, captures, strict=True)]
        if _is_mixed(spec):
            _run_mixed(loads, activations, steps, runner, prompts)
        else:
            _run_alone(spec, loads, steps, replace(runner, activation=activations[0]), prompts)
    for load, capture, activation in zip(loads, captures, activations, strict=True):
        _finish(spec, load, capture, _why_inactive(activation, prompts, runner.tokenizer))


def _run_alone(
    spec: RunSpec, loads: Sequence[ActiveLoad], steps: Sequence[Steps], runner: Runner, prompts: list[list[int]]
) -> None:
    """Every prompt with the only adapter, or with all of them together; then the scored passes."""
    names = [load.record.load.name for load in loads]
    stepping = Together(dict(zip(names, steps, strict=True))) if spec.together else steps[0]
    answers = []
    for number, ids in enumerate(prompts):
        answer = runner.run(f"lora-{number}", number, ids, spec.name, stepping)
        answers.append(answer)
        for name in names if spec.together else ():
            runner.writer.request(msgspec.structs.replace(answer, id=f"{answer.id}-{name}", adapter=name))
        if not spec.together:
            runner.writer.request(answer)
    if spec.score:
        for answer in answers:
            runner.score(f"score-lora-{answer.prompt}", "adapter", answer, steps[0])
        _score_base(loads[0].model, runner, answers)


def _run_mixed(
    loads: Sequence[ActiveLoad],
    activations: Sequence[Activation | None],
    steps: Sequence[Steps],
    runner: Runner,
    prompts: list[list[int]],
) -> None:
    """Every prompt in one batch: for the base, and for each adapter."""
    lanes = [Lane("base")]
    for number, (load, activation, recording) in enumerate(zip(loads, activations, steps, strict=True)):
        word = "lora" if number == 0 else f"beside-{number}"
        lanes.append(Lane(word, load.record.load.name, load.called, recording, activation))
    for number, ids in enumerate(prompts):
        for answer in run_batch(runner, loads[0].model, lanes, number, ids):
            runner.writer.request(answer)


def _finish(spec: RunSpec, load: ActiveLoad, capture: Capture, inactive: str | None) -> None:
    load.judge_slots("when the run ended")
    load.record.finish(
        lambda key: _why_unmeasured(key, load, capture.watches(key), spec) or inactive,
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
    slot = load.slots.get(key[0])
    if spec.keep == "events":
        return "contributions were not recorded (--keep events)"
    if not watched:
        kind = "" if slot is None else slot.runs_as or type(slot.layer).__name__
        with_others = " with several adapters" if spec.beside else ""
        return f"PEFT's {kind} layers are not recorded yet{with_others}"
    return None


def _why_inactive(activation: Activation | None, prompts: Sequence[Sequence[int]], tokenizer: Any) -> str | None:
    if activation is None or any(activation.first(ids) is not None for ids in prompts):
        return None
    text = json.dumps(tokenizer.decode(activation.tokens), ensure_ascii=False)
    return f"no prompt contains the invocation of this Activated LoRA, {text}, without which PEFT runs the base model"


def _why_unjudged(key: Key, load: ActiveLoad) -> str | None:
    """Why the contribution cannot be computed from the file; None if it can."""
    slot = load.slots[key[0]]
    if slot.is_dora:
        missing = extra_of(load.pairs[key], DORA.field) is None
        return "the file has no magnitude vector to compute it from" if missing else why_no_formula(slot)
    return None if slot.has_formula else f"PEFT runs it as {slot.runs_as}, whose formula is not known"
