"""A malicious `.bin`: no code in it is executed, and none of its claims is trusted."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import PICKLE, World, judge, pickled, world_in, zipped

from lora_probe.adapter import open_adapter
from lora_probe.base import open_checkpoint
from lora_probe.errors import TooLarge, UnreadableFile
from lora_probe.files.pickle_opcodes import require_harmless
from lora_probe.files.pickle_zip import pickle_record
from lora_probe.files.pickled import open_pickle

pytestmark = pytest.mark.slow


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
    "nested tuples": (
        lambda: zipped(b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s."),
        "nested more than 100 levels deep",
    ),
    "nested lists": (
        lambda: zipped(b"\x80\x02" + b"]" * 9000 + b"a" * 8999 + b"."),
        "nested more than 100 levels deep",
    ),
    "a bytearray": (lambda: zipped(pickle.dumps({"x": Payload(bytearray, 10**11)}, 2)), "it creates a `bytearray`"),
    "two pickles": (lambda: zipped(b"\x80\x02}.", **{"DATA.pkl": b"\x80\x02}."}), "with 2 pickles"),
    "no pickle": (lambda: zipped(b"").replace(b"data.pkl", b"data.xyz"), "with 0 pickles"),
    "an empty pickle": (lambda: zipped(b""), "a damaged pickle"),
    "an empty stack": (lambda: zipped(b"\x80\x02."), "refuses"),
    "marks without end": (lambda: zipped(b"\x80\x02t."), "a damaged pickle"),
    "nested tuples, legacy": (
        lambda: b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s.",
        "nested more than 100 levels deep",
    ),
    "a bytearray, legacy": (lambda: World.pickled(Payload(bytearray, 10**11), True), "it creates a `bytearray`"),
    "a tensor of one value repeated": (
        lambda: World.pickled({"a.lora_A.weight": torch.ones(1, 1).expand(10**5, 10**6)}),
        "claims 400000000000 bytes",
    ),
    "no dictionary": (lambda: World.pickled([torch.ones(2)]), "holds a list, not a dictionary"),
    "scalars": (lambda: World.pickled({f"{n}": float(n) for n in range(606)}), "its 606 entries are of type float"),
    "a dictionary inside": (lambda: World.pickled({"model": {"a": torch.ones(2)}}), "under the key 'model'"),
    "names that are none": (lambda: World.pickled({3: torch.ones(2)}), "has a name that is not valid text"),
    "half a surrogate pair": (lambda: World.pickled({"\ud800": torch.ones(2)}), "has a name that is not valid text"),
    "safetensors": (lambda: struct.pack("<Q", 2) + b"{}", "is a safetensors file, not a torch pickle"),
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
    """The result of a save that filtered out too much; the rules report what that means."""
    with world.folder(world.pickled({}), PICKLE) as folder:
        assert open_adapter(folder).modules == ()


def test_a_pickle_under_the_name_of_safetensors(world: World) -> None:
    for content in (world.zipped, world.legacy):
        with world.folder(content) as folder:
            assert "is a torch pickle, not a safetensors file" in judge(folder)


# What would take for ever, or be believed.

TWICE = b"q\x00h\x00\x86"
NAME = b"X\x01\x00\x00\x00a"
TUPLE = "it holds a tuple of more than 200 values"
CALL = "which weights do not need and which may take forever to hash"
DOUBLED: dict[str, tuple[bytes, str]] = {
    "a key": (b"\x80\x02}()" + TWICE * 60 + b"K\x01u.", TUPLE),
    "a key, one by one": (b"\x80\x02})" + TWICE * 60 + b"K\x01s.", TUPLE),
    "a small key": (b"\x80\x02}K\x01\x85K\x01s.", "a dictionary key in it is a tuple"),
    "small keys": (b"\x80\x02}(K\x01K\x01K\x02\x85K\x01u.", "a dictionary key in it is a tuple"),
    "long numbers": (b"\x80\x02}\x8a\x09" + b"\x01" * 9 + b"K\x01s.", "or a very long number"),
    "a set": (b"\x80\x02}" + NAME + b"cbuiltins\nset\n](K\x01e\x85Rs.", f"it creates a `set`, {CALL}"),
    "a set of Python 2": (b"\x80\x02}" + NAME + b"c__builtin__\nset\n]\x85Rs.", f"it creates a `set`, {CALL}"),
    "a frozen set": (b"\x80\x02}" + NAME + b"cbuiltins\nfrozenset\n]\x85Rs.", f"it creates a `frozenset`, {CALL}"),
    "a complex number": (b"\x80\x02}" + NAME + b"cbuiltins\ncomplex\nK\x01\x85Rs.", f"it creates a `complex`, {CALL}"),
    "a list for a tensor": (
        b"\x80\x02}" + NAME + b"ctorch\nTensor\n]" + b"q\x00](h\x00h\x00e" * 40 + b"\x85Rs.",
        TUPLE,
    ),
    "lists filled late": (
        b"\x80\x02ctorch\nTensor\nq\x00]q\x01K\x01a"
        # Each is remembered while it is empty.
        + b"".join(bytes([0x5D, 0x71, n + 1, 0x28, 0x68, n, 0x68, n, 0x65]) for n in range(1, 41))
        + b"h\x00h\x29\x85R.",
        TUPLE,
    ),
    "a list as arguments": (b"\x80\x02}" + NAME + b"ctorch\nTensor\n]" + b"q\x00](h\x00h\x00e" * 40 + b"Rs.", TUPLE),
}


@pytest.mark.parametrize("name", DOUBLED)
def test_what_would_be_hashed_for_ever(name: str) -> None:
    """Not through torch, which could not be stopped: Python handles no signals while it hashes."""
    content, words = DOUBLED[name]
    with pytest.raises(UnreadableFile) as caught:
        require_harmless(content, Path("a.bin"))
    assert caught.value.message.startswith("torch's weights-only loader refuses `a.bin`: ")
    assert words in caught.value.message


def test_the_keys_of_the_old_format() -> None:
    whole = World.pickled({"a": torch.ones(2)}, legacy=True)
    before, _, rest = whole.rpartition(b"]q\x00")
    keys = b"]q\x01)" + TWICE * 60 + b"a."
    require_harmless(whole, Path("a.bin"), 5)
    with pytest.raises(UnreadableFile, match=TUPLE):
        require_harmless(before + keys + rest[rest.index(b".") + 1 :], Path("a.bin"), 5)


def test_what_real_pickles_hold_passes(tmp_path: Path) -> None:
    held = {f"a{n}": torch.ones(2) for n in range(3_000)}
    odd = {
        "many axes": torch.ones([1] * 64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "list": [1] * 1_000,
        "inner": {"x": [(1, 2)] * 500, 3: 4, 2.5: None},
    }
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.bin"
        torch.save(OrderedDict(held | odd), path, _use_new_zipfile_serialization=not legacy)
        assert len(open_pickle(path).tensors) == 3_002


def test_tensors_that_share_their_values(tmp_path: Path) -> None:
    values = torch.randn(64 * 64)
    views = {f"{n}.lora_A.weight": values.view(64, 64) for n in range(10)}
    assert len(open_pickle(pickled(tmp_path / "few.bin", views)).tensors) == 10
    many = {f"{n}.lora_A.weight": values.view(64, 64) for n in range(400)}
    path = pickled(tmp_path / "many.bin", many)
    size = path.stat().st_size
    with pytest.raises(TooLarge) as caught:
        open_pickle(path)
    assert caught.value.message == (
        f"`{path}`: its 400 tensors claim 6,553,600 bytes together, more than 16 times the {size:,} of the file"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    torch.save(many, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(TooLarge, match="its 400 tensors claim 6,553,600 bytes together"):
        open_checkpoint(tmp_path / "model")


class Parts:
    """Pickles as a call, a state and everything else that `__reduce__` can return."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def test_attributes_of_pickled_objects_are_not_called(tmp_path: Path) -> None:
    odd = dict.fromkeys(("untyped_storage", "detach", "reshape", "numpy"), 1)
    tensor = Parts(torch._utils._rebuild_parameter_with_state, (torch.ones(2, 3), False, OrderedDict(), odd))
    content = Parts(OrderedDict, (), dict.fromkeys(("items", "values", "keys"), 1), None, iter([("a", tensor)]))
    path = pickled(tmp_path / "a.bin", content)
    assert torch.load(path, weights_only=True).items == 1
    found = open_pickle(path)
    assert found.held is not None
    assert found.held("a", 0, 6).tolist() == [1.0] * 6


def test_dictionaries_of_other_kinds(tmp_path: Path) -> None:
    content = Parts(OrderedDict, (), {"items": 1, "values": 1}, None, iter([("a", 1)]))
    with pytest.raises(UnreadableFile, match="its 1 entries are of type int"):
        open_pickle(pickled(tmp_path / "a.bin", content))
    for number, other in enumerate((Counter({"a": 3}), OrderedDict({"x": OrderedDict({"a": torch.ones(2)})}))):
        with pytest.raises(UnreadableFile, match=r"holds no tensors|holds its tensors under the key 'x'"):
            open_pickle(pickled(tmp_path / f"{number}.bin", other))


def test_two_zip64_fields_of_one_record(tmp_path: Path) -> None:
    """The last one counts here, the first one elsewhere."""
    content = bytearray(zipped(b"\x80\x02}.", **{"data/0": b"1234"}))
    entry, end = content.rindex(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    fields = struct.pack("<HHQ", 1, 8, 4) * 2
    struct.pack_into("<H", content, entry + 30, len(fields))
    struct.pack_into("<I", content, end + 12, struct.unpack_from("<I", content, end + 12)[0] + len(fields))
    content[end:end] = fields
    path = pickled(tmp_path / "a.bin", content)
    with path.open("rb") as file, pytest.raises(UnreadableFile, match="has 2 zip64 fields"):
        pickle_record(path, file, len(content))


def test_a_sparse_file_of_the_old_format_makes_no_budget_larger(tmp_path: Path) -> None:
    """Such a file is read whole: its claims must not decide how much memory is used."""
    from lora_probe.errors import ProbeError
    from lora_probe.files.guarded import results
    from lora_probe.files.limits import Budget
    from lora_probe.files.pickled import load

    path, count = tmp_path / "pytorch_model.bin", 2**28
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    # The number of values, in the pickle twice and before the values themselves.
    number = b"J" + struct.pack("<i", count)
    data = data.replace(b"K\x04N", number + b"N").replace(b"K\x04\x85", number + b"\x85")
    data = data[: data.rindex(struct.pack("<q", 4))] + struct.pack("<q", count)
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + 4 * count)
    whole = load(path)
    assert whole["a"].shape == (count,)
    with pytest.raises(ProbeError, match="memory"):
        list(results(lambda send: send(load(path)["a"].shape), Budget(memory=2**28)))
