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
from safetensors.numpy import load_file, save_file
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
    assert (
        verdict(diff_of(adapter, other))
        == "unrelated: all 9 modules have no more in common than those of two random adapters"
    )


def test_a_copy_is_one_only_if_all_values_are_equal(tmp_path: Path, llama: Path) -> None:
    """The digests are of a lattice of values. Here two modules differ from two others in one value beside it."""
    first = write_adapter(tmp_path / "first", llama)
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_B.weight" for layer in (0, 1)]

    def exchanged(tensors: dict[str, Any]) -> dict[str, Any]:
        other = {
            name: tensors[
                name.replace("layers.0", "layers.9").replace("layers.1", "layers.0").replace("layers.9", "layers.1")
            ]
            for name in tensors
            if "q_proj" in name and "layers.2" not in name
        }
        return tensors | other

    def almost(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors = exchanged(tensors)
        for name in names:
            tensors[name] = tensors[name].copy()
            tensors[name][127, 1] += 0.5
        return tensors

    kinds = {pair.kind for pair in diff_of(first, edited(first, tmp_path / "copy", exchanged)).modules[:1]}
    assert kinds == {"elsewhere"}
    almost_copied = diff_of(first, edited(first, tmp_path / "almost", almost))
    assert not almost_copied.of_kind("elsewhere")


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
    assert text == "trained apart from the same initial A: all 9 modules have much the same A, and another B"


def test_what_only_one_has_and_what_cannot_be_compared(adapter: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        kept = {name: values for name, values in tensors.items() if "layers.2" not in name}
        at = next(name for name in kept if "layers.1.self_attn.v_proj.lora_B" in name)
        kept[at] = kept[at] * np.float32("nan")
        return kept | {"base_model.model.model.norm.weight": np.ones(4, np.float32)}

    diff = diff_of(adapter, edited(adapter, tmp_path / "other", change))
    text = verdict(diff)
    assert text.startswith("A, B and the scaling are equal in 5 modules; ")
    assert "1 module not compared (layer 1 v_proj): A or B holds NaN or infinity" in text
    assert "3 modules only in the first: layer 2 q_proj, k_proj, v_proj" in text
    assert "other tensors differ: base_model.model.model.norm.weight" in text
    assert not diff.same


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_same_in_another_dtype(dtype: str, adapter: Path, tmp_path: Path) -> None:
    """What was rounded once is the same, and 1 % in one module is not rounding."""
    rounded = stored_as(adapter, tmp_path / "rounded", dtype)
    text = verdict(diff_of(adapter, rounded))
    assert text.startswith("the same ΔW in all 9 modules, within the rounding of ")
    assert "; stored in " in text
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
    rows = [line.split() for line in out.splitlines()]
    assert ["layer", "1", "v_proj", "multiple", "1.0000", "1.0500", "0.05", "100.0%", "100.0%"] in rows
    status, out, _ = call("inspect", adapter, adapter, "--format", "json", capsys=capsys)
    data = json.loads(out)
    assert (status, data["same"]) == (0, True)
    assert max(data["modules"][0]["row_angles"]) < 1e-2
    status, _, error = call("inspect", adapter, wrong, "--norms", capsys=capsys)
    assert status == 2
    assert "--norms and --module are for one adapter" in error


def stacked(first: Path, second: Path, folder: Path, share: float) -> Path:
    """PEFT's `cat` of two adapters at twice the rank, with a share of the first one's B."""
    other = load_file(second / "adapter_model.safetensors")

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        both = {}
        for name, values in tensors.items():
            scaled = values * np.float32(share) if "lora_B" in name else values
            both[name] = np.concatenate([scaled, other[name]], axis=0 if "lora_A" in name else 1)
        return both

    return edited(first, folder, change, lambda raw: raw | {"r": 16, "lora_alpha": 32})


def test_what_is_not_more_training(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """Shared subspaces alone say nothing about ΔW."""
    other = write_adapter(tmp_path / "other", llama, seed=9)
    nearly_none = stacked(adapter, other, tmp_path / "little", 0.001)
    assert verdict(diff_of(adapter, nearly_none)).startswith("unrelated: all 9 modules")
    both = stacked(adapter, other, tmp_path / "both", 1.0)
    assert "the subspaces of one are part of the other's: rank 8 and 16" in verdict(diff_of(adapter, both))

    def mixed(tensors: dict[str, Any]) -> dict[str, Any]:
        mix = np.random.default_rng(2).normal(size=(8, 8)).astype(np.float32)
        return {name: values @ mix if "lora_B" in name else values for name, values in tensors.items()}

    text = verdict(diff_of(adapter, edited(adapter, tmp_path / "mixed", mixed)))
    assert text.startswith("trained apart from the same initial A")


def test_zero_in_one_of_them(adapter: Path, tmp_path: Path) -> None:
    untrained = edited(adapter, tmp_path / "zero", times(0))
    assert verdict(diff_of(adapter, untrained)).startswith("all 9 modules are zero in the second, where nothing")
    unscaled = edited(adapter, tmp_path / "unscaled", lambda tensors: tensors, lambda raw: raw | {"lora_alpha": 0})
    for pair in ((adapter, unscaled), (unscaled, adapter)):
        assert verdict(diff_of(*pair)).startswith("the same weights in all 9 modules, at ")
        assert not diff_of(*pair).same
    assert diff_of(untrained, untrained).same


def test_a_copy_of_another_module(adapter: Path, tmp_path: Path) -> None:
    """Also one that is not changed itself, and in another dtype."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        renamed = {name.replace("layers.0.", "layers.1."): values for name, values in tensors.items() if ".0." in name}
        return tensors | {name: values for name, values in renamed.items() if "q_proj" in name}

    copied = edited(adapter, tmp_path / "copied", change)
    for folder in (copied, stored_as(copied, tmp_path / "rounded", "bfloat16")):
        assert "layer 1 q_proj has A and B of layer 0 q_proj" in verdict(diff_of(adapter, folder))


def test_what_decides_how_it_is_applied(adapter: Path, tmp_path: Path) -> None:
    same: Any = lambda tensors: tensors  # noqa: E731
    for number, change in enumerate(({"target_modules": ["q_proj"]}, {"fan_in_fan_out": True}, {"bias": "all"})):
        other = edited(adapter, tmp_path / f"other-{number}", same, lambda raw, change=change: raw | change)
        diff = diff_of(adapter, other)
        assert not diff.same
        assert verdict(diff).startswith("A, B and the scaling are equal in all 9 modules; the configs differ in ")


def test_numbers_at_the_limits(adapter: Path, tmp_path: Path) -> None:
    same: Any = lambda tensors: tensors  # noqa: E731
    tiny = edited(adapter, tmp_path / "tiny", same, lambda raw: raw | {"lora_alpha": 1e-200})
    assert verdict(diff_of(adapter, tiny))
    assert verdict(diff_of(tiny, tiny)).startswith("the same adapter")


@pytest.mark.slow
def test_the_time_is_linear_in_the_modules(tmp_path: Path) -> None:
    """Three thousand modules that all differ: minutes, if each was looked for among all."""
    folders = []
    for seed in (1, 2):
        numbers = np.random.default_rng(seed)
        tensors = {}
        for number in range(3_000):
            name = f"base_model.model.model.layers.{number}.q_proj"
            tensors[f"{name}.lora_A.weight"] = numbers.normal(size=(1, 4)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = numbers.normal(size=(4, 1)).astype(np.float32)
        folder = tmp_path / f"many-{seed}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        raw = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(raw))
        folders.append(folder)
    assert len(verdict(diff_of(*folders))) < 2_000
