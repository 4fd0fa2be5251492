"""The engine `example`: the attention inputs of a Llama, with numpy alone.

In: a `RunSpec`. Out: the folder `example/` of a trace. A row is the embedding of one token, normalised as the first
layer does it; q_proj, k_proj and v_proj of every layer are multiplied with it, so the first layer is that of the model
and the others are not. The next token is the one whose embedding is nearest to the last row plus what the adapter adds.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from lora_probe.adapter import Adapter, TrainedAs, open_adapter
from lora_probe.adapter.spectrum import gram
from lora_probe.base import Base, EngineView, open_base
from lora_probe.base.engine_view import of_headers
from lora_probe.engines.load_record import LoadRecord
from lora_probe.engines.prompts import forced
from lora_probe.engines.sampler import Sampler
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.files.values import read
from lora_probe.files.weights import open_weights
from lora_probe.ledger import OK
from lora_probe.names import Key, projection_of
from lora_probe.recording import (
    DECODE,
    PREFILL,
    SCHEMA,
    Floats,
    Load,
    Process,
    RequestRecord,
    Rows,
    RunSpec,
    TraceWriter,
)
from lora_probe.recording.placed import Placed, digest_of
from lora_probe.recording.rows import kept
from lora_probe.rules.lp5_loading import name_without_home
from lora_probe.rules.stored import Expected, expect
from lora_probe_example import __version__
from lora_probe_example.predictor import NAME, misfit
from lora_probe_example.rules import not_adapted

EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"


class ExampleEngine:
    """Entry point `example` of the group `lora_probe.engines`."""

    def describe(self, base: Base, trained: TrainedAs) -> EngineView:
        view = of_headers(base, NAME, "")
        if view is None:
            raise EngineFailed(f"`{base.path}` has no safetensors files")
        return replace(view, version=__version__, source="engine", notes=())

    def record(self, spec: RunSpec, folder: Path) -> None:
        if spec.adapter is None or spec.score:
            raise EngineFailed("the engine `example` only runs adapters, and scores no answers")
        process = Process(
            schema=SCHEMA,
            role="engine",
            engine=NAME,
            rank=0,
            pid=os.getpid(),
            versions={NAME: __version__},
            keep=spec.keep,
            dtype="float32",
            lora_dtype="float32",
        )
        with TraceWriter(folder / NAME, process) as writer:
            _record(spec, open_adapter(spec.adapter), writer)


@dataclass(frozen=True)
class _Model:
    """The weights of the base that are multiplied, and the tokens of its tokenizer."""

    base: Base
    weights: dict[str, Floats]
    tokens: dict[str, int]

    def rows(self, ids: list[int]) -> Floats:
        """The normalised embedding of each token."""
        embedded = self.weights[EMBEDDINGS][ids]
        square = np.mean(embedded**2, axis=-1, keepdims=True)
        rows: Floats = embedded / np.sqrt(square + self.base.config["rms_norm_eps"]) * self.weights[NORM]
        return rows

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, one for each character: enough for a tokenizer of bytes and ASCII."""
        return [self.tokens[sign] for sign in text.replace(" ", "Ġ")]


@dataclass(frozen=True)
class _Placed:
    """One pair of the adapter beside the weight that it belongs to."""

    weight: Floats
    a: Floats
    b: Floats
    scaling: float


@dataclass
class _Run:
    """Runs prompts one after another, and records the rows of those with the adapter."""

    model: _Model
    spec: RunSpec
    placed: dict[Key, _Placed]
    record: LoadRecord
    writer: TraceWriter
    sampler: Sampler = field(default_factory=Sampler)

    def answer(self, number: int, ids: list[int], name: str | None) -> RequestRecord:
        request = f"{'base' if name is None else 'lora'}-{number}"
        output = list(forced(self.spec, number))
        longest = len(output) + self.spec.max_tokens
        feed, start = ids + output, 0
        while len(output) < longest:
            rows = self.model.rows(feed)
            last = rows[-1].copy()
            if name is not None:
                last += self._adapted(request, rows, start, len(ids))
            output.append(int((self.model.weights[EMBEDDINGS] @ last).argmax()))
            feed, start = output[-1:], start + len(feed)
        words = {number: token for token, number in self.model.tokens.items()}
        text = "".join(words.get(token, "") for token in output).replace("Ġ", " ")
        return RequestRecord(request, number, name, ids, output, text)

    def _adapted(self, request: str, x: Floats, start: int, prompt: int) -> Floats:
        """One step with the adapter: record it, and return what it adds to the last row."""
        positions = list(range(start, start + len(x)))
        phases = [PREFILL if position < prompt else DECODE for position in positions]
        sampled = self.sampler.pick([request] * len(x), phases)
        added: Floats = np.zeros(x.shape[1], np.float32)
        columns: dict[str, list[Floats]] = {}
        tensors: dict[str, dict[Key, Floats]] = {}
        for key, pair in self.placed.items():
            base, shrink = x @ pair.weight.T, x @ pair.a.T
            delta = (shrink @ pair.b.T * pair.scaling).astype(np.float32)
            parts = {"x": x, "base": base, "delta": delta, "output": base + delta}
            for part, values in parts.items():
                columns.setdefault(f"{part}_norm", []).append(np.linalg.norm(values, axis=-1))
            columns.setdefault("shrink", []).append(_padded(shrink, self.rank))
            for part in ("x", "base", "delta"):
                tensors.setdefault(part, {})[key] = parts[part]
            if sampled:
                self.record.sample(key, x[sampled], delta[sampled], pair.a, pair.b, pair.scaling)
            if delta.shape[1] == len(added):
                added += delta[-1]
        self.record.ran(len(x), self.placed, len(x))
        if self.placed and self.spec.keep != "events":
            self._write(request, positions, phases, columns, tensors)
        return added

    @property
    def rank(self) -> int:
        return max(len(pair.a) for pair in self.placed.values())

    def _write(
        self,
        request: str,
        positions: list[int],
        phases: list[int],
        columns: dict[str, list[Floats]],
        tensors: dict[str, dict[Key, Floats]],
    ) -> None:
        count = len(positions)
        shrink = np.stack(columns.pop("shrink"), axis=1)
        grams = [_padded(_padded(gram(pair.b, pair.scaling), self.rank).T, self.rank) for pair in self.placed.values()]
        digests = tuple(digest_of(pair.a, pair.b * np.float32(pair.scaling)) for pair in self.placed.values())
        with_shrink = kept("shrink", self.spec.keep)
        more: dict[str, Any] = {name: np.stack(values, axis=1) for name, values in columns.items()}
        more |= {name: values for name, values in tensors.items() if kept(name, self.spec.keep)}
        self.writer.rows(
            Rows(
                modules=tuple(self.placed),
                requests=(request,),
                request=np.zeros(count, np.int32),
                position=np.array(positions, np.int32),
                phase=np.array(phases, np.int8),
                load=np.zeros(count, np.int32),
                shrink=shrink if with_shrink else None,
                placed={self.record.number: Placed(digests, np.stack(grams) if with_shrink else None)},
                **more,
            )
        )


def _record(spec: RunSpec, adapter: Adapter, writer: TraceWriter) -> None:
    model = _open_model(spec.model)
    writer.event("engine", f"numpy {np.__version__}, {len(model.weights)} tensors of the base")
    expected = expect(adapter, model.base.shapes)
    load = Load(0, spec.name, str(adapter.path), adapter.digest())
    pairs = [row for row in expected if row.entry is not None and not row.homeless]
    adapted = [row for row in pairs if not_adapted(projection_of(row.module)) is None]
    misfits = [why for row in adapted if (why := _misfit(row, model.base))]
    if misfits:
        writer.event("refused", misfits[0])
        load = replace(load, refused=True, message=misfits[0])
    record = LoadRecord(writer, load, adapter, expected, "float32")
    record.announce({row.key: row.module for row in adapted})
    if misfits:
        return
    record.station(
        "read",
        {
            row.key: OK if not row.homeless else name_without_home(row.entry.stored_as, None, "Example")
            for row in expected
            if row.entry is not None
        },
    )
    record.station("placed", {row.key: not_adapted(projection_of(row.module)) or OK for row in pairs})
    placed = {row.key: _placed(row, adapter, model) for row in adapted}
    writer.event("activate", f"{len(placed)} layers adapted")
    run = _Run(model, spec, placed, record, writer)
    prompts = [list(prompt.ids) or model.encode(prompt.text) for prompt in spec.prompts]
    for name in (None, spec.name):
        for number, ids in enumerate(prompts):
            writer.request(run.answer(number, ids, name))
    record.finish(lambda key: None if spec.keep != "events" else "contributions were not recorded (--keep events)")


def _open_model(name: str) -> _Model:
    base = open_base(name)
    weights: dict[str, Floats] = {}
    for path in sorted(base.path.glob("*.safetensors")):
        file = open_weights(path)
        weights |= {header.name: read(file, header) for header in file.tensors.values()}
    if not {EMBEDDINGS, NORM} <= weights.keys():
        raise ProbeError(f"`{name}` is not a Llama: it has no `{NORM}`")
    tokenizer = json.loads((base.path / "tokenizer.json").read_text(encoding="utf-8"))
    return _Model(base, weights, tokenizer["model"]["vocab"])


def _misfit(row: Expected, base: Base) -> str:
    shape = base.shapes.get(row.module)
    assert row.entry is not None
    return misfit(row.entry, shape) if shape is not None else ""


def _placed(row: Expected, adapter: Adapter, model: _Model) -> _Placed:
    assert row.entry is not None
    assert row.entry.a is not None
    assert row.entry.b is not None
    a, b = adapter.values(row.entry.a), adapter.values(row.entry.b)
    return _Placed(model.weights[f"{row.module}.weight"], a, b, row.entry.scaling)


def _padded(values: Floats, width: int) -> Floats:
    """The same rows with zeros behind them, up to `width` columns."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))
