"""`inspect A B` on pairs whose relation is known."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_pairs import CASES, V1, times
from conftest import call
from safetensors.numpy import load_file
from written import edited, write_adapter, write_base

from lora_probe.adapter import open_adapter
from lora_probe.adapter.diff_verdict import verdict
from lora_probe.adapter.side_by_side import AdapterDiff, side_by_side


def diff_of(first: Path, second: Path) -> AdapterDiff:
    return side_by_side(open_adapter(first), open_adapter(second))


@pytest.mark.parametrize("name", CASES)
def test_a_known_pair(name: str, adapter: Path, tmp_path: Path) -> None:
    case = CASES[name]
    diff = diff_of(adapter, edited(adapter, tmp_path / "second", case.tensors, case.config))
    assert verdict(diff).startswith(case.says), verdict(diff)
    assert diff.same == case.same


def test_another_seed(adapter: Path, llama: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", llama, seed=9)
    assert verdict(diff_of(adapter, other)) == "unrelated: all 9 modules share no more than two random adapters"


def test_trained_on_the_merge(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """The files show no relation; the base models that they name do."""
    merged = write_base(tmp_path / "merged")
    other = write_adapter(tmp_path / "other", merged, seed=9)
    text = verdict(diff_of(adapter, other))
    assert text.startswith("unrelated: all 9 modules")
    assert text.endswith(f"the configs name different base models: {llama} and {merged}")


def test_the_same_start(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """One initialisation of A, and B from two trainings."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        numbers = np.random.default_rng(7)
        return {
            name: numbers.normal(0, 0.05, values.shape).astype(np.float32) if "lora_B" in name else values
            for name, values in tensors.items()
        }

    text = verdict(diff_of(adapter, edited(adapter, tmp_path / "other", change)))
    assert text == "trained apart from the same initial A: all 9 modules share the rows of A, and B is another one"


def test_what_only_one_has_and_what_cannot_be_compared(adapter: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        kept = {name: values for name, values in tensors.items() if "layers.2" not in name}
        at = next(name for name in kept if "layers.1.self_attn.v_proj.lora_B" in name)
        kept[at] = kept[at] * np.float32("nan")
        return kept | {"base_model.model.model.norm.weight": np.ones(4, np.float32)}

    diff = diff_of(adapter, edited(adapter, tmp_path / "other", change))
    text = verdict(diff)
    assert "1 of 6 modules differs: layer 1 v_proj not compared: A or B holds NaN or infinity" in text
    assert "3 modules only in the first: layer 2 q_proj, k_proj, v_proj" in text
    assert "other tensors differ: base_model.model.model.norm.weight" in text
    assert not diff.same


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_same_in_another_dtype(dtype: str, adapter: Path, tmp_path: Path) -> None:
    """What was rounded once is the same, and 1 % in one module is not rounding."""
    rounded = stored_as(adapter, tmp_path / "rounded", dtype)
    assert verdict(diff_of(adapter, rounded)).startswith("the same ΔW in all 9 modules, stored in ")
    wrong = edited(adapter, tmp_path / "wrong", times(1.01, V1))
    both = stored_as(adapter, tmp_path / "one", dtype), stored_as(wrong, tmp_path / "two", dtype)
    assert verdict(diff_of(*both)).startswith("1 of 9 modules differs: layer 1 v_proj at 1.01 times ΔW of the first")


def stored_as(adapter: Path, folder: Path, dtype: str) -> Path:
    """The same adapter in a dtype with fewer bits."""
    edited(adapter, folder, lambda tensors: tensors)
    path = folder / "adapter_model.safetensors"
    stored = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    header: dict[str, Any] = {}
    data = b""
    for name, values in load_file(path).items():
        if dtype == "float16":
            raw = values.astype(np.float16).tobytes()
        else:
            bits = values.view(np.uint32)
            raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": stored, "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def test_the_command_line(adapter: Path, tmp_path: Path, capsys: Any) -> None:
    wrong = edited(adapter, tmp_path / "wrong", times(1.05, V1))
    status, out, error = call("inspect", adapter, wrong, capsys=capsys)
    assert status == 1
    assert out.startswith("1 of 9 modules differs: layer 1 v_proj at 1.05 times ΔW of the first\n")
    assert ["layer", "1", "v_proj", "multiple", "1.0000", "1.0500", "0.05", "100.0%", "100.0%"] in map(
        str.split, out.splitlines()
    )
    status, out, _ = call("inspect", adapter, adapter, "--format", "json", capsys=capsys)
    data = json.loads(out)
    assert (status, data["same"]) == (0, True)
    assert max(data["modules"][0]["row_angles"]) < 1e-2
    status, _, error = call("inspect", adapter, wrong, "--norms", capsys=capsys)
    assert status == 2
    assert "--norms and --module are for one adapter" in error
