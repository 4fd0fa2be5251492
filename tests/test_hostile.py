"""Folders that were damaged at random, or that would use all memory: one clear error or a correct answer.

Failures that fuzzing found are here as explicit examples. The profile is deterministic: the same mutations every time.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import CONFIG, PICKLE, WEIGHTS, World, judge, world_in
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

GIB = 2**30
ROOM = 300
"""MiB that reading any file may use, including the interpreter and numpy."""
TORCH = 250
"""MiB that importing torch takes by itself."""

pytestmark = pytest.mark.slow

fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def world(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.mktemp("hostile"), llama)


# What wants memory.


def peak(folder: Path, *, reads: bool = True) -> tuple[int, str]:
    """MiB of a process that opens an adapter and reads it, and its output."""
    script = (
        "import sys\n"
        "from lora_probe.adapter.checkpoint import open_adapter\n"
        "from lora_probe.errors import ProbeError\n"
        "try:\n"
        "    found = open_adapter(sys.argv[1])\n"
        "    print(len(found.weights.tensors), 'tensors')\n"
        "    for tensor in found.weights.tensors.values() if sys.argv[2:] else ():\n"
        "        found.values(tensor)\n"
        "except ProbeError as error:\n"
        "    print(error.message)\n"
        "line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(int(line.split()[1]) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), *(["reads"] if reads else [])],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    *said, memory = done.stdout.splitlines()
    return int(memory), " ".join(said)


def sparse(path: Path, start: bytes, size: int = 10 * GIB) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def header(entries: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


BIG = {"dtype": "F32", "shape": [8, 0], "data_offsets": [0, 0]}


def test_ten_gigabytes_of_safetensors(world: World) -> None:
    def entry(size: int) -> dict[str, Any]:
        return {"a.lora_A.weight": {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}}

    whole = 10 * GIB
    length = len(header(entry(whole)))
    starts = {
        "has 2,684,354,": header(entry(whole - length - (whole - length) % 16)),
        "leaves a gap": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [64, 68]}}),
        "bytes that belong to no tensor": header({}),
        "does not begin with `{`": struct.pack("<Q", 99_000_000),
        "is not valid": header({}, 99_000_000),
        "its header claims": header({}, 10 * GIB - 8),
    }
    for words, start in starts.items():
        with world.folder(b"") as folder:
            size = whole if "has 2" not in words else length + (whole - length) // 16 * 16
            sparse(folder / WEIGHTS, start, size)
            memory, said = peak(folder)
        if words != "is not valid":
            assert words in said
        assert "adapter_model.safetensors" in said
        assert memory < ROOM, words


def test_ten_gigabytes_of_pickles(world: World) -> None:
    starts = {
        "is not a torch pickle": b"",
        "it has no directory at its end": world.zipped[:2000],
        "format used before torch 1.6": world.legacy,
    }
    for words, start in starts.items():
        with world.folder(b"", PICKLE) as folder:
            sparse(folder / PICKLE, start)
            memory, said = peak(folder)
        assert words in said
        assert memory < ROOM, words


def test_a_pickle_of_ten_gigabytes_that_is_whole_is_mapped(world: World) -> None:
    from torch.serialization import skip_data

    with world.folder(b"", PICKLE) as folder:
        with skip_data():
            torch.save({"a.lora_A.weight": torch.empty(4, 5 * GIB // 8)}, folder / PICKLE)
        assert (folder / PICKLE).stat().st_size >= 10 * GIB
        memory, said = peak(folder)
    assert "1 tensors" in said
    assert "has 2,684,354,560 values, more than any lora_A or lora_B has" in said
    assert memory < ROOM + TORCH


def test_a_config_of_a_hundred_megabytes(world: World) -> None:
    with world.folder(world.safetensors) as folder:
        sparse(folder / CONFIG, b"{", 100_000_000)
        memory, said = peak(folder)
        assert "has 100000000 bytes, more than the limit of 10000000" in said
        assert memory < 100
        (folder / CONFIG).write_bytes(b'{"peft_type": "LORA", "x": [' + b"{}," * 3_300_000 + b"{}]}")
        memory, said = peak(folder)
        assert memory < 2 * ROOM


def test_a_header_of_brackets(world: World) -> None:
    for inner in (b"[]," * 30_000_000, b"1," * 45_000_000):
        text = b'{"a": [' + inner + b"[]]}"
        with world.folder(struct.pack("<Q", len(text)) + text) as folder:
            memory, said = peak(folder)
        assert "are mostly brackets, not tensors" in said
        assert memory < ROOM


# What is damaged at random, by structure.

ODD: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, -(2**63), 2**63, 2**64, 10**400, -1, 0])
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["(", "(?i)a", "*", "\\", ")(", "a{99999999999}", "(?P<idx>x)", "\0", "\x1b[31m", "٣", "²", "\ud800"]
    )
    | st.sampled_from(["q_proj", ".*q_proj", "all-linear", "model.layers.0.self_attn.q_proj", "9" * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


FIELDS = ["dtype", "shape", "data_offsets", "other"]
EDITS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(FIELDS), ODD)
    | st.tuples(st.just("name"), st.integers(0, 5), st.text()),
    min_size=1,
    max_size=3,
)


@fuzzed
@given(edits=EDITS)
@example(edits=[(0, "shape", [0, 2**62, 2**62])])
@example(edits=[(0, "shape", deep(300))])
@example(edits=[("name", 0, "²." + "q" * 9), ("name", 1, "layers." + "9" * 5000 + ".q.lora_A.weight")])
@example(edits=[("name", 0, "\ud800.lora_A.weight")])
@example(edits=[("name", 0, "__metadata__")])
def test_any_header(world: World, edits: list[tuple[Any, Any, Any]]) -> None:
    (length,) = struct.unpack("<Q", world.safetensors[:8])
    entries = json.loads(world.safetensors[8 : 8 + length])
    names = [name for name in entries if name != "__metadata__"]
    for where, field, value in edits:
        if where == "name":
            entries[value] = entries.pop(names[field], None)
        elif names[where] in entries:
            entries[names[where]][field] = value
    text = json.dumps(entries).encode()
    with world.folder(struct.pack("<Q", len(text)) + text + world.safetensors[8 + length :]) as folder:
        judge(folder)


@settings(fuzzed, max_examples=75)
@given(st.data())
def test_any_bytes(world: World, data: st.DataObject) -> None:
    """Bytes overwritten, removed or inserted, mostly in the structure of the file."""
    name, content = data.draw(
        st.sampled_from(
            [(WEIGHTS, world.safetensors), (PICKLE, world.zipped), (PICKLE, world.legacy), (CONFIG, world.config)]
        )
    )
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        size = len(changed)
        near = st.integers(0, min(size, 2500)) | st.integers(max(size - 1500, 0), size)
        at = data.draw(near | st.integers(0, size))
        what = data.draw(st.sampled_from(["set", "cut", "put", "end"]))
        if what == "set" and at < size:
            changed[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del changed[at : at + data.draw(st.integers(1, 64))]
        elif what == "put":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        elif what == "end":
            del changed[at:]
    if name == CONFIG:
        with world.folder(world.safetensors, config=bytes(changed)) as folder:
            judge(folder)
    else:
        with world.folder(bytes(changed), name) as folder:
            judge(folder)


KEYS = [
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "modules_to_save",
    ),
    *(
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "target_parameters",
        "base_model_name_or_path",
        "bias",
    ),
    *(
        "init_lora_weights",
        "peft_version",
        "fan_in_fan_out",
        "use_dora",
        "task_type",
        "trainable_token_indices",
        "config",
    ),
    *("lora_parameters", "model_class", "architectures", "model_type", "lora_rank", "inference_mode"),
]


@fuzzed
@given(st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=4))
@example({"rank_pattern": {"(?i)a": 4}})
@example({"rank_pattern": {"a)(b": 4}})
@example({"layers_pattern": ["("], "layers_to_transform": [0]})
@example({"layers_pattern": "(?P<idx>x)", "layers_to_transform": [0]})
@example({"modules_to_save": [")"]})
@example({"target_modules": "(" * 5000 + ")" * 5000})
@example({"target_modules": "a{99999999999}"})
@example({"target_modules": "a" * 1_000_000})
@example({"bias": deep(400), "init_lora_weights": "\ud800"})
@example({"target_modules": deep(400)})
@example({"rank_pattern": {"x": deep(400)}})
@example({"r": 10**400})
@example({"target_parameters": [[]]})
@example({"layers_pattern": [[]]})
@example({"exclude_modules": [[]], "layers_to_transform": [[0]]})
@example({"target_parameters": ["." * 20, ""]})
def test_any_config(world: World, changes: dict[str, Any]) -> None:
    config = json.loads(world.config) | changes
    with world.folder(world.safetensors, config=json.dumps(config).encode()) as folder:
        judge(folder)


@fuzzed
@given(ODD)
@example([])
def test_any_json_at_all(world: World, value: Any) -> None:
    with world.folder(world.safetensors, config=json.dumps(value).encode()) as folder:
        judge(folder)


@pytest.mark.parametrize("levels", [400, 900, 990, 100_000])
def test_json_of_any_depth(world: World, levels: int) -> None:
    nested = b"[" * levels + b"]" * levels
    entry = b'{"a": ' + nested + b"}"
    for config in (nested, b'{"peft_type": "LORA", "bias": ' + nested + b"}", b'{"peft_type": ' + nested + b"}"):
        with world.folder(world.safetensors, config=config) as folder:
            judge(folder)
    for header_text in (entry, b'{"__metadata__": ' + entry + b"}", b'{"a": {"dtype": ' + nested + b"}}"):
        with world.folder(struct.pack("<Q", len(header_text)) + header_text) as folder:
            assert "damaged safetensors header" in judge(folder)


OBJECTS = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
    # Tensors by their kinds.
    | st.sampled_from([torch.ones(2, 3), torch.ones(()), torch.ones(0, 3), torch.ones(2, dtype=torch.complex64)])
    | st.sampled_from([torch.ones(2, 4).T, torch.ones(2, 3).to(torch.bfloat16), torch.ones(3).bool()])
    | st.just(torch.eye(2).to_sparse()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@fuzzed
@given(changes=st.dictionaries(st.text(max_size=30), OBJECTS, max_size=4), legacy=st.booleans())
@example(changes={"x.lora_A.weight": torch.ones(())}, legacy=False)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_pickle(world: World, changes: dict[str, Any], legacy: bool) -> None:
    with world.folder(world.pickled(world.tensors | changes, legacy), PICKLE) as folder:
        judge(folder)
