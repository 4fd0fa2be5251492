"""Folders that mean harm, or were damaged as badly: one clear error or a right answer, nothing executed, little memory.

What the fuzzing found stands here as an explicit example. The profile is deterministic: the same mutations every time.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_adapter
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_probe.adapter import Adapter, open_adapter
from lora_probe.cli import main
from lora_probe.errors import ProbeError, UnreadableFile

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
GIB = 2**30
ROOM = 300
"""MiB that reading any file may take, the interpreter and numpy included."""
TORCH = 250
"""MiB that importing torch takes by itself."""

fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class World:
    """A real adapter in both forms, and a fresh folder for every mutation of it."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.numbers = root, itertools.count()
        self.config = (source / CONFIG).read_bytes()
        self.safetensors = (source / WEIGHTS).read_bytes()
        self.tensors = load_file(source / WEIGHTS)
        self.zipped, self.legacy = (self.pickled(self.tensors, legacy) for legacy in (False, True))

    @staticmethod
    def pickled(content: Any, legacy: bool = False) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
        return buffer.getvalue()

    @contextlib.contextmanager
    def folder(self, weights: bytes, name: str = WEIGHTS, config: bytes | None = None) -> Iterator[Path]:
        folder = self.root / str(next(self.numbers))
        folder.mkdir()
        (folder / CONFIG).write_bytes(self.config if config is None else config)
        (folder / name).write_bytes(weights)
        yield folder
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def world(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("hostile")
    return World(root, save_adapter(root / "real", llama, r=2, target_modules=["q_proj"]))


def opened(folder: Path) -> Adapter | ProbeError:
    try:
        return open_adapter(folder)
    except ProbeError as error:
        return error


def judge(folder: Path) -> str:
    """Open, read every value, inspect in every form: the error's words, or nothing. Any other exception fails."""
    found = opened(folder)
    if isinstance(found, ProbeError):
        assert found.message.isprintable(), found.message
        assert len(found.message) < 700
        assert call("inspect", folder) == 2
        return found.message
    for tensor in found.weights.tensors.values():
        with contextlib.suppress(UnreadableFile):
            found.values(tensor)
    found.config.targeted([module.module for module in found.modules])
    found.digest()
    for form in (["--norms"], ["--format", "json"], ["--norms", "--format", "json"]):
        assert call("inspect", folder, *form) == 0
    for module in found.modules[:1]:
        assert call("inspect", folder, "--module", module.stored_as, "--format", "json") in (0, 2)
        assert call("inspect", folder, "--module", module.stored_as) in (0, 2)
    return ""


def call(*arguments: object) -> int:
    """The command line, what it prints encoded as it would be on a terminal."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main([str(argument) for argument in arguments])
    out.flush()
    return status


# What wants to be executed.


class Payload:
    """Pickles as a call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("name", [PICKLE, "adapter_model.pt"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["alone", "beside", "inside", "as a key", "as a name"])
def test_nothing_is_executed(world: World, tmp_path: Path, legacy: bool, place: str, name: str) -> None:
    mark = tmp_path / "executed"
    payload = Payload(os.system, f"touch {mark}")
    contents: dict[str, Any] = {
        "alone": payload,
        "beside": {**world.tensors, "x": payload},
        "inside": {**world.tensors, "x": {"y": [{"z": (1, payload)}]}},
        "as a key": {**world.tensors, payload: 1},
        "as a name": {**world.tensors, "x": Payload(eval, f"open({str(mark)!r}, 'w')")},
    }
    with world.folder(world.pickled(contents[place], legacy), name) as folder:
        message = judge(folder)
    assert f"torch's weights-only loader refuses `{folder / name}`: " in message
    assert ("GLOBAL" in message) is True
    assert not mark.exists()


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """An archive as torch writes it, with a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in ({"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"} | records).items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


LONG = b"\x80\x02}X" + struct.pack("<I", 2_000_000) + b"x" * 2_000_000 + b"K\x01s."
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a compressed pickle": (lambda: zipped(b"\0" * 10_000_000, zipfile.ZIP_DEFLATED), "a compressed record"),
    "a compressed version": (
        lambda: zipped(b"\x80\x02}.", zipfile.ZIP_DEFLATED, byteorder=b"\0" * 10_000_000),
        "a compressed record",
    ),
    "a huge version": (
        lambda: zipped(b"\x80\x02}.", byteorder=b"\0" * 2_000_000),
        "a record that torch does not write",
    ),
    "a huge pickle": (lambda: zipped(b"\x80\x02" + b"]" * 3_000_000), "more than tensors need"),
    "a long string": (lambda: zipped(LONG, **{f"data/{n}": b"" for n in range(1000)}), "a string of 2000000 bytes"),
    "nested tuples": (lambda: zipped(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s."), "nested more than 100 deep"),
    "nested lists": (lambda: zipped(b"\x80\x02" + b"]" * 9000 + b"a" * 8999 + b"."), "nested more than 100 deep"),
    "a bytearray": (lambda: zipped(pickle.dumps({"x": Payload(bytearray, 10**11)}, 2)), "it makes a `bytearray`"),
    "two pickles": (lambda: zipped(b"\x80\x02}.", **{"DATA.pkl": b"\x80\x02}."}), "with 2 pickles"),
    "no pickle": (lambda: zipped(b"").replace(b"data.pkl", b"data.xyz"), "with 0 pickles"),
    "an empty pickle": (lambda: zipped(b""), "a damaged pickle"),
    "an empty stack": (lambda: zipped(b"\x80\x02."), "refuses"),
    "marks without end": (lambda: zipped(b"\x80\x02t."), "a damaged pickle"),
    "nested tuples, legacy": (lambda: b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.", "nested more than 100 deep"),
    "a bytearray, legacy": (lambda: World.pickled(Payload(bytearray, 10**11), True), "it makes a `bytearray`"),
    "a tensor of one value repeated": (
        lambda: World.pickled({"a.lora_A.weight": torch.ones(1, 1).expand(10**5, 10**6)}),
        "claims 400000000000 bytes",
    ),
    "no dictionary": (lambda: World.pickled([torch.ones(2)]), "holds a list, not a dictionary"),
    "scalars": (lambda: World.pickled({f"{n}": float(n) for n in range(606)}), "its 606 entries are of the kind float"),
    "a dictionary inside": (lambda: World.pickled({"model": {"a": torch.ones(2)}}), "inside of 'model'"),
    "names that are none": (lambda: World.pickled({3: torch.ones(2)}), "has a name that is no text"),
    "half a surrogate pair": (lambda: World.pickled({"\ud800": torch.ones(2)}), "has a name that is no text"),
    "safetensors": (lambda: struct.pack("<Q", 2) + b"{}", "is a safetensors file, not a pickle"),
    "a web page": (lambda: b"<!DOCTYPE html><html>", "is a web page"),
    "a pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    "nothing": (lambda: b"", "is empty (0 bytes)"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_that_means_harm(world: World, name: str) -> None:
    make, words = BOMBS[name]
    with world.folder(make(), PICKLE) as folder:
        message = judge(folder)
    assert words in message
    assert str(folder / PICKLE) in message


def test_an_empty_state_dict_is_no_error(world: World) -> None:
    """What a save that filtered too much leaves; what that means is for the rules to say."""
    with world.folder(world.pickled({}), PICKLE) as folder:
        assert open_adapter(folder).modules == ()


def test_a_pickle_under_the_name_of_safetensors(world: World) -> None:
    for content in (world.zipped, world.legacy):
        with world.folder(content) as folder:
            assert "is a pickle of torch, not a safetensors file" in judge(folder)


# What wants memory.


def peak(folder: Path, *, reads: bool = True) -> tuple[int, str]:
    """MiB of a process that opens an adapter and reads it, and what it said."""
    script = (
        "import sys\n"
        "from lora_probe.adapter import open_adapter\n"
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
        "leaves a hole": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [64, 68]}}),
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
        "is not a pickle of torch": b"",
        "it has no directory at its end": world.zipped[:2000],
        "format of before torch 1.6": world.legacy,
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
    assert "has 2,684,354,560 values, more than any half of a LoRA pair" in said
    assert memory < ROOM + TORCH


def test_a_config_of_a_hundred_megabytes(world: World) -> None:
    with world.folder(world.safetensors) as folder:
        sparse(folder / CONFIG, b"{", 100_000_000)
        memory, said = peak(folder)
        assert "has 100000000 bytes, more than 10000000; no config is so large" in said
        assert memory < 100
        (folder / CONFIG).write_bytes(b'{"peft_type": "LORA", "x": [' + b"{}," * 3_300_000 + b"{}]}")
        memory, said = peak(folder)
        assert memory < 2 * ROOM


def test_a_header_of_brackets(world: World) -> None:
    for inner in (b"[]," * 30_000_000, b"1," * 45_000_000):
        text = b'{"a": [' + inner + b"[]]}"
        with world.folder(struct.pack("<Q", len(text)) + text) as folder:
            memory, said = peak(folder)
        assert "are brackets rather than tensors" in said
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


@fuzzed
@given(st.data())
def test_any_bytes(world: World, data: st.DataObject) -> None:
    """Bytes overwritten, cut out or put in, mostly where the structure is."""
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
