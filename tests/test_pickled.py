"""A `.bin` that means harm: nothing of it is executed, and nothing that it claims is believed."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import PICKLE, World, judge, world_in

from lora_probe.adapter import open_adapter


@pytest.fixture(scope="module")
def world(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.mktemp("hostile"), llama)


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
    assert "GLOBAL" in message
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


@pytest.mark.parametrize("size", [9, 600])
def test_a_storage_that_runs_into_its_neighbours(world: World, size: int) -> None:
    """torch maps the file, and takes as many bytes as the pickle names: more than the record has, or than the file."""
    one = world.pickled({"a.lora_A.weight": torch.ones(8), "b": torch.zeros(80)})
    short, long = b"K\x08", b"K\x09" if size == 9 else b"M\x58\x02"
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    pickled = records.pop("data.pkl").replace(short, long)
    assert len(pickled) != 0
    with world.folder(zipped(pickled, **records), PICKLE) as folder:
        assert "claims a record of " in judge(folder) or "refuses" in judge(folder)


def test_an_empty_state_dict_is_no_error(world: World) -> None:
    """What a save that filtered too much leaves; what that means is for the rules to say."""
    with world.folder(world.pickled({}), PICKLE) as folder:
        assert open_adapter(folder).modules == ()


def test_a_pickle_under_the_name_of_safetensors(world: World) -> None:
    for content in (world.zipped, world.legacy):
        with world.folder(content) as folder:
            assert "is a pickle of torch, not a safetensors file" in judge(folder)
