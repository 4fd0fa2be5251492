"""A safetensors file as `weights.py` reads it, whole and damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_probe.errors import UnreadableFile
from lora_probe.files.values import read, widen
from lora_probe.files.weights import open_weights
from lora_probe.precision import DTYPES, Dtype


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_values_are_widened_exactly(tmp_path: Path, name: str) -> None:
    import torch
    from safetensors.torch import save_file as save_tensors

    dtype = getattr(torch, name)
    values = {"a": torch.randn(5, 3).to(dtype), "b": torch.tensor([float("inf"), -0.0, float("nan")]).to(dtype)}
    save_tensors(values, tmp_path / "x.safetensors", {"format": "pt"})
    file = open_weights(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    for name, tensor in values.items():
        np.testing.assert_array_equal(read(file, file.tensors[name]), tensor.float().numpy())


def test_empty_file_of_tensors_is_no_error(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    assert open_weights(tmp_path / "x.safetensors").tensors == {}


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"a": entry([2], 0, 8)}, b"\0" * 4, "truncated"),
        ({"a": entry([2], 0, 8)}, b"\0" * 12, "belong to no tensor"),
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12, "overlaps"),
        ({"a": entry([2], 4, 12)}, b"\0" * 12, "gap"),
        ({"a": entry([2], 0, 4)}, b"\0" * 4, "needs 8 bytes"),
        ({"a": entry([2], -8, 0)}, b"\0" * 8, "needs 8 bytes"),
        ({"a": entry([-1], 0, 8)}, b"\0" * 8, "impossible shape"),
        ({"a": entry([2], 0, 8, "F99")}, b"\0" * 8, "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "impossible offsets"),
        ({"a": 3}, b"", "not an object"),
        ([1, 2], b"", "does not begin with `{`"),
        (b'{"a": 1, "a": 2}', b"", "appears twice"),
        ({"__metadata__": {"a": 1}}, b"", "not an object of strings"),
        ({"a": entry([0, 2**62, 2**62], 0, 0)}, b"", "impossible shape"),
        ({"a\x1b[31m" + "x" * 1000: entry([-1], 0, 8)}, b"", r"`a\\x1b\[31mx{100,110}\.\.\.` has the impossible shape"),
        (b'{"\\ud800": {}}', b"", "not a name that UTF-8 can encode"),
        (b'{"a": [' + b'"data_offsets",' * 500_001 + b"0]}", b"", "names 500,001 tensors"),
        (b"{" * 20000, b"", "damaged"),
        (b"\xff\xfe", b"", "damaged"),
    ],
)
def test_damage_is_named(tmp_path: Path, header: Any, data: bytes, word: str) -> None:
    path = raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(UnreadableFile, match=word) as caught:
        open_weights(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"This is a text file, not weights.\n", "begins with"),
        (b"\x08\0", "begins with"),
        (struct.pack("<Q", 1 << 60) + b"{}", "claims"),
        (struct.pack("<Q", 500) + b"{}", "claims"),
    ],
)
def test_wrong_file_types_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match=word):
        open_weights(path)


def test_a_header_whose_length_begins_like_a_pickle(tmp_path: Path) -> None:
    text = json.dumps({"a": entry([2], 0, 8)}).encode()
    path = raw(tmp_path / "x.safetensors", text.ljust(640), b"\0" * 8)
    assert path.read_bytes().startswith(b"\x80\x02")
    assert list(open_weights(path).tensors) == ["a"]


def test_folder_and_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no"):
        with pytest.raises(UnreadableFile, match="cannot read"):
            open_weights(path)


def test_values_of_a_file_that_shrank(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.ones(100, np.float32)}, path)
    file = open_weights(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UnreadableFile, match="ends inside tensor `a`"):
        read(file, file.tensors["a"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.rounding is None], ids=lambda dtype: dtype.name)
def test_values_of_other_dtypes_are_those_of_torch(dtype: Dtype) -> None:
    """PEFT and vLLM convert every dtype with torch."""
    import torch

    raw = np.arange(256, dtype=np.uint8)
    kind = getattr(torch, dtype.name)
    bits = raw % 2 if dtype.name == "bool" else raw
    expected = torch.from_numpy(bits.copy()).view(kind).to(torch.float32).numpy()
    np.testing.assert_array_equal(widen(bits.view(dtype.storage), dtype.stored), expected)
