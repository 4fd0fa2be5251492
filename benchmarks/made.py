"""Made files of realistic size: adapters, a base model with its merge, and traces.

In: an empty folder and a size. Out: the paths. Values are random with a fixed seed; shapes are those of models in use.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from lora_probe.adapter import open_adapter
from lora_probe.ledger import OK
from lora_probe.names import Key
from lora_probe.recording import (
    SCHEMA,
    Load,
    ModuleRecord,
    Placed,
    Process,
    Prompt,
    RequestRecord,
    Rows,
    Run,
    RunSpec,
    TraceWriter,
    write_json,
)

Floats = npt.NDArray[np.float32]
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama-like model. `keys` is the width of k_proj and v_proj."""

    layers: int
    hidden: int
    inner: int
    keys: int
    vocabulary: int

    def linear(self, layer: int) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer: (out, in) by name."""
        attention = {"q_proj": self.hidden, "k_proj": self.keys, "v_proj": self.keys, "o_proj": self.hidden}
        shapes = {f"self_attn.{name}": (out, self.hidden) for name, out in attention.items()}
        shapes |= {f"mlp.{name}": (self.inner, self.hidden) for name in ("gate_proj", "up_proj")}
        shapes["mlp.down_proj"] = (self.hidden, self.inner)
        return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


SMALL = Shape(layers=30, hidden=576, inner=1536, keys=192, vocabulary=49152)
"""SmolLM2-135M, the demo's base model."""
OF_1_5B = Shape(layers=28, hidden=1536, inner=8960, keys=256, vocabulary=151936)
OF_7B = Shape(layers=32, hidden=4096, inner=11008, keys=4096, vocabulary=32000)
OF_70B = Shape(layers=80, hidden=8192, inner=28672, keys=1024, vocabulary=128256)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """The upper half of each float32."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def adapter_shapes(shape: Shape, rank: int, targets: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int]]]:
    """The names and shapes of an adapter's tensors; `targets` are the last parts of modules' names, or none for all."""
    for layer in range(shape.layers):
        for module, (out, width) in shape.linear(layer).items():
            if not targets or module.rpartition(".")[2] in targets:
                yield f"base_model.model.{module}.lora_A.weight", (rank, width)
                yield f"base_model.model.{module}.lora_B.weight", (out, rank)


def write_config(folder: Path, rank: int, targets: tuple[str, ...], **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = list(targets) or sorted({name.rpartition(".")[2] for name in OF_7B.linear(0)})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config | more))


def _header(shape: Shape, rank: int, targets: tuple[str, ...]) -> tuple[bytes, int]:
    """The header of an adapter's file in bfloat16, and the bytes of all values."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, (rows, width) in adapter_shapes(shape, rank, targets):
        end = offset + 2 * rows * width
        entries[name] = {"dtype": "BF16", "shape": [rows, width], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text, offset


def save_adapter(
    folder: Path, shape: Shape, rank: int, targets: tuple[str, ...] = (), seed: int = 0, noise: float = 0.0
) -> Path:
    """An adapter in bfloat16. With `noise`, the one of the same seed whose values have been moved by that much."""
    random, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    write_config(folder, rank, targets)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(_header(shape, rank, targets)[0])
        for _, size in adapter_shapes(shape, rank, targets):
            values = random.standard_normal(size, np.float32) * np.float32(0.02)
            if noise:
                values += other.standard_normal(size, np.float32) * np.float32(0.02 * noise)
            file.write(bfloat16(values).tobytes())
    return folder


def sparse_adapter(folder: Path, shape: Shape, rank: int, targets: tuple[str, ...] = ()) -> Path:
    """An adapter whose header is complete and whose values are a hole in the file: zeros that take no disk space."""
    write_config(folder, rank, targets)
    header, size = _header(shape, rank, targets)
    (folder / WEIGHTS).write_bytes(header)
    os.truncate(folder / WEIGHTS, len(header) + size)
    return folder


def save_like(folder: Path, adapter: str, rank: int, seed: int = 0) -> Path:
    """An adapter of another rank on the same modules as `adapter`, with scaling 2 and random values."""
    like = open_adapter(adapter)
    random = np.random.default_rng((rank, seed))
    tensors = {}
    for name, header in like.weights.tensors.items():
        half = "A" if ".lora_A." in name else "B" if ".lora_B." in name else ""
        if half:
            shape = (rank, *header.shape[1:]) if half == "A" else (*header.shape[:-1], rank)
            tensors[name] = random.standard_normal(shape, np.float32) * np.float32(0.05)
    config = json.loads((like.path / "adapter_config.json").read_text())
    config |= {"r": rank, "lora_alpha": 2 * rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


def many_adapters(folder: Path, count: int) -> Path:
    """Folders of adapters as a training run leaves them: ten files, to which the folders after the tenth have hard
    links."""
    for number in range(count):
        home = folder / f"checkpoint-{number:04d}"
        first = folder / f"checkpoint-{number % 10:04d}"
        if number < 10:
            save_adapter(home, SMALL, 8, ("q_proj", "k_proj", "v_proj"), seed=number)
            continue
        write_config(home, 8, ("q_proj", "k_proj", "v_proj"))
        os.link(first / WEIGHTS, home / WEIGHTS)
    return folder


EACH = 200
"""Rows of one request of a made trace."""
PROCESS = Process(SCHEMA, "engine", "vllm", 0, 1, {"vllm": "0.32.0"}, keep="norms", dtype="bfloat16")


def keys_of(shape: Shape) -> tuple[Key, ...]:
    """The modules q, k and v of all layers."""
    names = [name for layer in range(shape.layers) for name in shape.linear(layer) if name[-6:] in ATTENTION[:3]]
    return tuple((name, "weight", None) for name in names)


def save_trace(folder: Path, rows: int, shape: Shape = OF_1_5B, seed: int = 0) -> Path:
    """A trace of `rows` rows with norms of q, k and v, and a request for each 200 of them."""
    keys = keys_of(shape)
    prompts = [Prompt(f"prompt {number}", [1]) for number in range(rows // EACH)]
    spec = RunSpec("vllm", "/adapter", "a", "/model", prompts, EACH - 1)
    folder.mkdir(parents=True)
    write_json(folder / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, {"vllm": "0.32.0"}))
    with TraceWriter(folder / "vllm", PROCESS) as writer:
        writer.record(Load(0, "a", "/adapter", "d"))
        for key in keys:
            writer.record(ModuleRecord(0, *key, ["file"]))
        for station in ("stored", "read", "placed", "applied", "agrees"):
            writer.station(0, station, OK, list(keys))
        for number in range(rows // EACH):
            ids = list(range(EACH - 1))
            writer.request(RequestRecord(f"r{number}", number, "a", [1], ids, "words " * 100, [-0.5] * len(ids)))
        for of_step in steps(rows, shape, seed):
            writer.rows(of_step)
    return folder


def steps(rows: int, shape: Shape = OF_1_5B, seed: int = 0, step: int = 64) -> Iterator[Rows]:
    """The rows of a made trace, `step` at a time."""
    random, keys = np.random.default_rng(seed), keys_of(shape)
    placed = {0: Placed(("x",) * len(keys))}
    for start in range(0, rows, step):
        numbers = np.arange(start, min(start + step, rows))
        size, first = (len(numbers), len(keys)), start // EACH
        norms = {name: 1 + random.random(size, np.float32) for name in ("x_norm", "base_norm", "output_norm")}
        yield Rows(
            modules=keys,
            requests=tuple(f"r{number}" for number in range(first, int(numbers[-1]) // EACH + 1)),
            request=(numbers // EACH - first).astype(np.int32),
            position=(numbers % EACH).astype(np.int32),
            phase=(numbers % EACH > 0).astype(np.int8),
            load=np.zeros(len(numbers), np.int32),
            delta_norm=random.random(size, np.float32),
            placed=placed,
            **norms,
        )
