"""The PEFT engine: runs base and adapter as PEFT runs them, and records both.

In: a `RunSpec`. Out: the folder `peft/` of a trace. Generation is greedy, one prompt at a time, with transformers'
own key-value cache; every forward pass is a step whose rows are the positions it computes.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from lora_probe.adapter import adapter_in, open_adapter
from lora_probe.base import Base, EngineView, Shapes
from lora_probe.engines.account import Account, relative_difference
from lora_probe.engines.peft.capture import Capture
from lora_probe.engines.peft.models import first_lines, load_model, load_tokenizer, short
from lora_probe.engines.peft.plain import describe_model, record_plain
from lora_probe.engines.peft.runner import Runner, end_ids
from lora_probe.engines.prompts import encode
from lora_probe.files.weights import TensorHeader
from lora_probe.ledger import OK, Finding
from lora_probe.names import PREFIX, Key
from lora_probe.precision import coarser
from lora_probe.recording import SCHEMA, Load, Process, RunSpec, TraceWriter
from lora_probe.rules.lp2_names import odd_ending
from lora_probe.rules.lp5_loading import name_without_home, no_lora_layer, not_measured, not_taken, placed_differs
from lora_probe.rules.stored import Expected, expect

ADAPTER = "default"
"""What the adapter is called inside PEFT. A folder's name may clash with a method of torch's modules (`train`)."""


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

    def describe(self, base: Base, task: str | None) -> EngineView:
        """See `lora_probe.engines.Engine.describe`."""
        from lora_probe.engines.peft.view import describe

        return describe(base, task, self.versions["peft"])

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
            changed=[f"--{name.replace('_', '-')} is vLLM's and changes nothing here" for name in ignored],
        )
        with TraceWriter(folder / "peft", process) as writer:
            if spec.adapter is None:
                record_plain(spec, writer)
            else:
                _record(spec, spec.adapter, writer)


def _record(spec: RunSpec, path: str, writer: TraceWriter) -> None:
    started = time.perf_counter()
    # The model first: of a folder that is none, that is what is to be said.
    model = load_model(spec.model, spec.options.get("dtype", "auto"))
    tokenizer = load_tokenizer(spec.model)
    runner = Runner(model, tokenizer, spec, end_ids(getattr(model, "generation_config", None), tokenizer), writer)
    describe_model(writer, model, spec, started)
    dtype = writer.process.dtype
    prompts = encode(spec, tokenizer)
    for number, ids in enumerate(() if spec.score else prompts):
        # A scored run sees the base on the adapter's own answers instead.
        writer.request(runner.run(f"base-{number}", number, ids, None))
    shapes = _shapes(model)
    adapter = open_adapter(path)
    expected = expect(adapter, shapes)
    load = Load(0, spec.name, str(adapter.path), adapter.digest(), engine_id=None, slot=None)
    peft_model, live, load = _attach(model, spec, load, writer)
    writer.describe(lora_dtype=_lora_dtype(live, dtype))
    account = Account(writer, load, adapter, expected, coarser(dtype, writer.process.lora_dtype))
    account.announce({row.key: row.module for row in expected if row.module in live})
    if peft_model is None:
        return
    _judge_loading(account, live, shapes)
    recorded = {key: live[key[0]] for key in _recordable(expected, live)} if spec.keep != "events" else {}
    answers = []
    with Capture(recorded, ADAPTER, spec.keep, spec.score) as capture:
        runner.capture, runner.account = capture, account
        for number, ids in enumerate(prompts):
            answers.append(runner.run(f"lora-{number}", number, ids, spec.name))
            writer.request(answers[-1])
        for answer in answers if spec.score else ():
            runner.score(f"score-lora-{answer.prompt}", "adapter", answer)
    runner.capture = None
    if spec.score:
        with _without_adapter(peft_model) as changed:
            for answer in answers:
                runner.score(f"score-base-{answer.prompt}", "base", answer, changed)
    _judge_placed(account, live, "when the run ended")
    extras = {row.key: row.entry.extras for row in expected if row.entry is not None}
    account.finish(
        lambda key: _why_unmeasured(key, live, recorded, account, spec),
        lambda key: _why_unjudged(live[key[0]], extras[key]),
    )


@contextmanager
def _without_adapter(peft_model: Any) -> Iterator[str]:
    """The base for the length of a block. Gives PEFT's own words where this is not quite the base (trained biases)."""
    with ExitStack() as stack:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            stack.enter_context(peft_model.disable_adapter())
        yield " ".join(short(str(warning.message)) for warning in caught)


def _attach(model: Any, spec: RunSpec, load: Load, writer: TraceWriter) -> tuple[Any, dict[str, Any], Load]:
    """Let PEFT load the adapter: its model and the live LoRA layers by module, or None and the load as refused."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    wanted = spec.options.get("lora_dtype", "auto")
    writer.event("read", f"PeftModel.from_pretrained({spec.adapter!r})")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        started = time.perf_counter()
        try:
            peft_model = PeftModel.from_pretrained(model, spec.adapter, adapter_name=ADAPTER)
        # A refusal is an answer: whatever PEFT raises here is recorded as its word on the adapter.
        except Exception as error:
            message = first_lines(error)
            writer.event("refused", message, seconds=round(time.perf_counter() - started, 3))
            return None, {}, replace(load, refused=True, message=message)
    if wanted != "auto":
        import torch

        # From the float32 that PEFT loads, so that every value is rounded once.
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(getattr(torch, wanted))
    peft_model.eval()
    said = [short(str(warning.message)) for warning in caught if issubclass(warning.category, UserWarning)]
    root = peft_model.get_base_model()
    live = {name: layer for name, layer in root.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in live.items():
        writer.event("wrap", f"{type(layer.base_layer).__name__} -> {type(layer).__name__}", module=name)
    writer.event(
        "activate",
        f"{len(live)} layers replaced, adapter `{spec.name}` active as `{ADAPTER}`",
        seconds=round(time.perf_counter() - started, 3),
    )
    return peft_model, live, replace(load, said=said)


def _shapes(model: Any) -> Shapes:
    """The modules that PEFT can adapt, by the names of the live model: path -> (out, in)."""
    import torch
    from transformers.pytorch_utils import Conv1D

    shapes: dict[str, tuple[int, int] | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            # A quantised Linear packs its weight; the features are what they were.
            shapes[name] = module.out_features, module.in_features
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = module.num_embeddings, module.embedding_dim
        elif isinstance(module, Conv1D):
            shapes[name] = int(module.weight.shape[1]), int(module.weight.shape[0])
    return shapes


def _judge_loading(account: Account, live: Mapping[str, Any], shapes: Shapes) -> None:
    read: dict[Key, Finding] = {}
    placed: dict[Key, Finding] = {}
    for row in account.expected:
        if row.entry is None:
            continue
        # A parameter that PEFT wraps may belong to a module that is no Linear: its name has a home all the same.
        wrapped = row.module == row.entry.module and row.module in live
        if not wrapped and (row.homeless or row.module not in shapes):
            meant = row.module if row.module != row.entry.module else None
            read[row.key] = name_without_home(row.entry.stored_as, meant, "PEFT")
            continue
        if not all(tensor.name.startswith(PREFIX) for tensor in row.entry.tensors):
            read[row.key] = not_taken("PEFT", f"its name does not begin with `{PREFIX}`")
            continue
        if not {adapter_in(tensor) for tensor in row.entry.tensors} <= {None, ADAPTER}:
            read[row.key] = not_taken("PEFT", "another adapter's name stands in its name")
            continue
        embedded = bool(getattr(live.get(row.module), "lora_embedding_A", None))
        half = row.entry.a or row.entry.b
        if half is not None and (ending := odd_ending(half.name, embedded, adapter_in(half))) is not None:
            read[row.key] = ending
            continue
        read[row.key] = OK
        if row.module not in live:
            placed[row.key] = no_lora_layer("PEFT", "the config does not target it")
    account.station("read", read)
    account.station("placed", placed)
    _judge_placed(account, live, "after loading")


def _judge_placed(account: Account, live: Mapping[str, Any], moment: str) -> None:
    account.station(
        "placed",
        {
            row.key: _placed(account, row, live[row.module], moment)
            for row in account.expected
            if row.entry is not None and row.key not in account.gone
        },
    )


def _placed(account: Account, row: Expected, layer: Any, moment: str) -> Finding:
    """Compare the live A, B and scaling with the file, bit for bit after the cast to the live dtype."""
    import torch

    assert row.entry is not None
    pair = row.entry
    if pair.parameter != "weight":
        return not_measured("PEFT's wrappers of fused expert parameters are not read yet")
    if pair.a is None or pair.b is None:
        return placed_differs("the missing half", float("inf"), moment)
    homes = (layer.lora_embedding_A, layer.lora_embedding_B) if pair.embedding else (layer.lora_A, layer.lora_B)
    for half, tensor, home in (("lora_A", pair.a, homes[0]), ("lora_B", pair.b, homes[1])):
        weight = home[ADAPTER].detach() if pair.embedding else home[ADAPTER].weight.detach()
        wanted = torch.from_numpy(account.adapter.values(tensor)).to(weight.dtype)
        if (difference := relative_difference(weight.cpu(), wanted)) is not None:
            return placed_differs(half, difference, moment)
    if layer.scaling[ADAPTER] != pair.scaling:
        error = abs(layer.scaling[ADAPTER] / pair.scaling - 1) if pair.scaling else float("inf")
        return placed_differs("the scaling", error, moment)
    return OK


def _recordable(expected: tuple[Expected, ...], live: Mapping[str, Any]) -> Iterator[Key]:
    """The rows whose layer is one of PEFT's LoRA `Linear`s: the ones that the hooks understand.

    Activated LoRA hands its layers some of the rows alone, and no hook sees which.
    """
    from peft.tuners.lora import Linear

    for row in expected:
        layer = live.get(row.module)
        if row.entry is None or row.key[1] != "weight" or not isinstance(layer, Linear):
            continue
        if not (_variant(layer) or "").startswith("ALora"):
            yield row.key


def _why_unmeasured(
    key: Key, live: Mapping[str, Any], recorded: Mapping[Key, Any], account: Account, spec: RunSpec
) -> str | None:
    layer = live.get(key[0])
    if spec.keep == "events":
        return "contributions were not recorded (--keep events)"
    if key not in recorded:
        kind = _variant(layer) if key[1] == "weight" and hasattr(layer, "lora_variant") else None
        return f"PEFT's {kind or type(layer).__name__} layers are not recorded yet"
    if _variant(layer) is not None and not account.has_run(key):
        return f"PEFT runs it as {_variant(layer)}, which the hooks do not see"
    return None


def _why_unjudged(layer: Any, extras: tuple[TensorHeader, ...]) -> str | None:
    """Why the contribution is not s·(x·Aᵀ)·Bᵀ of the file: a variant of LoRA, or a bias on B."""
    if _variant(layer) is not None:
        return f"PEFT runs it as {_variant(layer)}, whose delta is not s·(x·Aᵀ)·Bᵀ"
    return "lora_B has a bias, which is part of its delta" if any("lora_B.bias" in e.name for e in extras) else None


def _variant(layer: Any) -> str | None:
    variant = layer.lora_variant.get(ADAPTER)
    return type(variant).__name__ if variant is not None else None


def _lora_dtype(live: Mapping[str, Any], default: str) -> str:
    """The dtype that the contribution is computed in: the live lora_B's."""
    for layer in live.values():
        for part in getattr(layer, "lora_B", {}).values():
            return str(part.weight.dtype).removeprefix("torch.")
    return default
