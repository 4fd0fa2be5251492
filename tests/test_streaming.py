"""Large adapters, traces and merges within the memory that a small one takes.

The files are sparse or made for this: their values are holes, zeros that take no disk space. The limit is the command's
own, `--max-memory`, which the kernel enforces.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from safetensors import safe_open
from test_trace_format import process, rows
from traces import header, sparse

from lora_probe.ledger import OK
from lora_probe.recording import Load, ModuleRecord, TraceWriter

pytestmark = [pytest.mark.slow, pytest.mark.wide]

GB = 10**9


def sparse_weights(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], meta: dict[str, str] | None = None
) -> dict[str, int]:
    """Write a safetensors file without values; where the values of each tensor would begin."""
    entries: dict[str, Any] = {} if meta is None else {"__metadata__": meta}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * WIDTHS[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    begin = header(entries)
    sparse(len(begin) + offset, begin)(path)
    return {name: len(begin) + entries[name]["data_offsets"][0] for name in tensors}


WIDTHS = {"BF16": 2, "F32": 4, "I32": 4, "I8": 1}


def adapter_of(folder: Path, layers: int, hidden: int, rank: int, names: tuple[str, ...] = ("q_proj", "v_proj")) -> int:
    """An adapter in bfloat16; the size of its file."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(names)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(layers):
        for name in names:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = "BF16", (rank, hidden)
            tensors[f"{stem}.lora_B.weight"] = "BF16", (hidden, rank)
    sparse_weights(folder / "adapter_model.safetensors", tensors)
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.timeout(300)
def test_an_adapter_of_a_gigabyte(tmp_path: Path, capsys: Any) -> None:
    """Every command that reads its values, in a quarter of its size; two adapters at once in half of it."""
    assert adapter_of(tmp_path / "large", layers=64, hidden=8192, rank=256) > GB
    within = ("--max-memory", "0.25")
    status, out, err = call("inspect", tmp_path / "large", "--norms", *within, capsys=capsys)
    assert (status, "128 modules" in out) == (0, True), err
    status, out, err = call("check", tmp_path / "large", *within, capsys=capsys)
    assert (status, "128 modules" in out) == (1, True), err
    twice = ("inspect", tmp_path / "large", tmp_path / "large", "--max-memory", "0.5")
    status, out, err = call(*twice, capsys=capsys)
    assert (status, out.startswith("the same adapter")) == (0, True), err


def test_more_memory_than_the_limit_is_refused(tmp_path: Path, capsys: Any) -> None:
    """The limit counts: one pair that needs more is an error, not a wrong answer."""
    adapter_of(tmp_path / "pair", layers=1, hidden=2**15, rank=250)
    status, _, err = call("inspect", tmp_path / "pair", "--norms", "--max-memory", "0.0625", capsys=capsys)
    assert (status, "used up its memory" in err) == (2, True)


MODULES, ROWS = 560, 50_000
"""Modules of 80 layers, and rows of a large segment: 9 kB for each row, 450 MB."""


@pytest.mark.timeout(600)
def test_a_trace_of_ten_gigabytes(tmp_path: Path, capsys: Any) -> None:
    """`show` adds up rows a part at a time. The norms of the large segments are holes; their requests and positions are
    those of a long run."""
    trace = tmp_path / "run.lptrace"
    keys = tuple((f"model.layers.{number // 7}.m{number % 7}", "weight", None) for number in range(MODULES))
    with TraceWriter(trace / "vllm", process(role="worker", engine="vllm")) as writer:
        writer.record(Load(0, "a", "/a", "d"))
        for key in keys:
            writer.record(ModuleRecord(0, *key, ["file"]))
        for station in ("stored", "read", "placed", "applied", "agrees"):
            writer.station(0, station, OK, keys)
        writer.rows(rows(4, keys=keys))
    large = [grown(trace / "vllm", number) for number in range(2, 26)]
    assert sum(path.stat().st_size for path in large) > 10 * GB
    assert sum(path.stat().st_blocks * 512 for path in large) < 100_000_000
    words = ("show", trace, "--requests", "--format", "json", "--max-memory", "0.5", "--timeout", "500")
    status, out, err = call(*words, capsys=capsys)
    assert status == 0, err
    report = json.loads(out)
    assert report["headline"] == f"{MODULES} of {MODULES} modules took effect"
    assert sum(request["rows"] for request in report["request_rows"]) == 4 + ROWS * len(large)


@pytest.mark.timeout(300)
def test_a_merge_of_ten_gigabytes(tmp_path: Path, capsys: Any) -> None:
    """`parity --weights-only` compares two models tensor by tensor. All their values are zero, and so is ΔW."""
    side, layers = 16384, 10
    weights = {f"model.layers.{n}.self_attn.q_proj.weight": ("BF16", (side, side)) for n in range(layers)}
    for name in ("base", "merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        sparse_weights(tmp_path / name / "model.safetensors", weights)
        assert (tmp_path / name / "model.safetensors").stat().st_size > 5 * GB
    adapter_of(tmp_path / "adapter", layers=layers, hidden=side, rank=8, names=("q_proj",))
    command = ("parity", tmp_path / "adapter", "--model", tmp_path / "base", "--merged", tmp_path / "merged")
    words = (*command, "--weights-only", "--format", "json", "--max-memory", "0.5", "--timeout", "250")
    status, out, err = call(*words, capsys=capsys)
    report = json.loads(out)
    assert (status, len(report["modules"])) == (0, layers), err


def grown(folder: Path, number: int) -> Path:
    """A segment with the columns of the first one and many more rows, of a request of its own."""
    with safe_open(folder / "000001.safetensors", framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        columns = {name: (column.get_dtype(), column.get_shape()) for name, column in slices.items()}
        meta = dict(file.metadata())
    table = json.loads(meta["table"]) | {"requests": [f"request {number}"]}
    of_rows = {name: (dtype, (ROWS, *shape[1:])) for name, (dtype, shape) in columns.items() if name in KEPT}
    path = folder / f"{number:06d}.safetensors"
    starts = sparse_weights(path, of_rows, meta | {"table": json.dumps(table)})
    with path.open("r+b") as file:
        file.seek(starts["position"])
        file.write(np.arange(ROWS, dtype=np.int32).tobytes())
    described = json.loads((folder / "process.json").read_text())
    (folder / "process.json").write_text(json.dumps(described | {"segments": number}))
    return path


KEPT = ("request", "position", "phase", "load", "x_norm", "base_norm", "delta_norm", "output_norm")
