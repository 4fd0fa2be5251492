"""A real trace to damage, the ways to damage it, and the check for every damage: one clear error."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from safetensors import safe_open
from safetensors.numpy import save_file
from test_trace_format import KEYS, process, rows

from lora_probe.ledger import OK, Finding
from lora_probe.recording import (
    SCHEMA,
    Load,
    ModuleRecord,
    Prompt,
    RequestRecord,
    Rows,
    Run,
    RunSpec,
    Score,
    TraceWriter,
    write_json,
)
from lora_probe.recording.sketch import SKETCH

GIB = 2**30
SEGMENT, SECOND = "peft/000001.safetensors", "peft/000002.safetensors"
SCORE = "peft/next-000001.safetensors"
TABLE = {"modules": KEYS, "requests": ["a"]}

Damage = Callable[[Path], None]


def whole(start: int, keys: Any = KEYS) -> Rows:
    """Rows with everything that a segment can contain."""
    count, modules = 4, len(keys)
    tables = dict.fromkeys(keys, np.ones((count, 3), np.float32))
    sketch = np.ones((count, modules, SKETCH), np.float32)
    return replace(rows(count, start=start, keys=keys), sketch=sketch, x=tables, base=tables, delta=tables)


def write(folder: Path, code: str = "") -> Path:
    """A healthy trace with two segments and two scored passes. With `code`, one module is lost under that rule."""
    folder.mkdir(parents=True)
    spec = RunSpec("peft", "/adapter", "a", "/model", [Prompt("Who are you?", [1, 2])], 2)
    write_json(folder / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, {"torch": "2.9"}))
    with TraceWriter(folder / "peft", process(dtype="float32")) as writer:
        writer.event("wrap", "Linear -> Linear", module=KEYS[0][0], seconds=0.1, more=[1])
        writer.record(Load(0, "a", "/adapter", "d"))
        for key in KEYS:
            writer.record(ModuleRecord(0, *key, ["file"]))
        for station in ("stored", "read", "placed", "applied", "agrees"):
            writer.station(0, station, OK, KEYS)
        if code:
            writer.station(0, "read", Finding("absent", code, "it is gone"), KEYS[:1])
        for request, adapter in (("a", "a"), ("b", None)):
            writer.request(RequestRecord(request, 0, adapter, [1, 2], [3, 4], "hello", [-0.5, -0.5]))
        writer.rows(whole(0))
        # Other modules close the segment.
        writer.rows(whole(4, KEYS[:1]))
        for kind in ("adapter", "base"):
            writer.score(Score("a", 0, kind, [1, 2], [3, 4]), np.full((2, 8), -2, np.float32))
    return folder


@contextmanager
def little_memory() -> Iterator[None]:
    """One GiB more than is used now: a reader without bounds fails instead of filling the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (int(used.split()[1]) * 1024 + GIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def refused(trace: Path, good: Path, words: str, capsys: pytest.CaptureFixture[str], *, show_too: bool = True) -> None:
    """`show` and `compare` of both sides print the same one error. Without `show_too`, only rows of several segments
    together are damaged: `show`, which never joins them, shows the trace."""
    shows: list[list[Any]] = [["show", trace], ["show", trace, "--format", "json"], ["show", trace, "--requests"]]
    for command in () if show_too else shows:
        status, out, err = call(*command, capsys=capsys)
        assert (status, err, "2 of 2 modules took effect" in out) == (0, "", True)
    compares: list[list[Any]] = [["compare", trace, good], ["compare", good, trace]]
    for command in [*(shows if show_too else ()), *compares]:
        status, out, err = call(*command, capsys=capsys)
        assert status == 2, err
        if "json" in command:
            assert words in json.loads(out)["error"]["message"]
        else:
            assert out == ""
        (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert words in error
        assert str(trace) in error
        assert len(error) < 1000
        assert "Traceback" not in err
        assert "report this bug" not in err
        assert all(line.startswith(("error: ", "hint: ")) for line in err.splitlines())


# Ways to damage it.


def replaced(name: str, put: Callable[[Path], object]) -> Damage:
    """Something else in place of a file."""

    def damage(trace: Path) -> None:
        (trace / name).unlink()
        put(trace / name)

    return damage


def sparse(size: int, start: bytes = b"") -> Callable[[Path], None]:
    """A file of `size` bytes that takes no space on disk."""

    def put(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return put


def header(entries: dict[str, Any]) -> bytes:
    """The header of a safetensors file, with any contents."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def resaved(path: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    """A segment with other columns or other metadata."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = dict(file.metadata())
    change(tensors, meta)
    save_file(tensors, path)
    # The metadata may be what safetensors would not write.
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    path.write_bytes(header({"__metadata__": meta, **entries}) + content[8 + length :])


def columns(name: str = SEGMENT, **changes: Any) -> Damage:
    """Other columns: a function of the old column, or None to remove it."""

    def damage(trace: Path) -> None:
        def change(tensors: dict[str, Any], meta: dict[str, str]) -> None:
            for column, value in changes.items():
                before = tensors.pop(column, None)
                if value is not None:
                    tensors[column] = np.array(value(before), order="C")

        resaved(trace / name, change)

    return damage


def table(text: str | None = None, **changes: Any) -> Damage:
    """Another table, or other fields of it."""

    def damage(trace: Path) -> None:
        def change(tensors: dict[str, Any], meta: dict[str, str]) -> None:
            meta["table"] = text if text is not None else json.dumps(json.loads(meta["table"]) | changes)

        resaved(trace / SEGMENT, change)

    return damage


def without(key: str) -> Damage:
    """A table that lacks a field."""

    def damage(trace: Path) -> None:
        def change(tensors: dict[str, Any], meta: dict[str, str]) -> None:
            found = json.loads(meta["table"])
            del found[key]
            meta["table"] = json.dumps(found)

        resaved(trace / SEGMENT, change)

    return damage


def as_type(dtype: Any) -> Callable[[Any], Any]:
    return lambda before: before.astype(dtype)


def tensor(name: str, shape: tuple[int, ...] = (4, 3), dtype: Any = np.float32) -> Damage:
    return columns(**{name: lambda _: np.ones(shape, dtype)})
