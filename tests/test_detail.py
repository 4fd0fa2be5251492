"""`-q` and `-v`: the verdict alone, what matters, everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from reports import made_up
from served import A, B, mixed
from test_compare_runs import record
from test_pages import adapter_of

runs = pytest.fixture(made_up, name="runs")
DEEP = [f"model.layers.{layer}.self_attn.{name}" for layer in range(40) for name in ("q_proj", "v_proj")]


def test_quiet_is_one_line_and_nothing_on_standard_error(runs: Path, tmp_path: Path, capsys: Any) -> None:
    trace = mixed(tmp_path / "run", A, B)
    answered = record(tmp_path / "answered")
    folder = adapter_of(tmp_path / "a", DEEP)
    cases = {
        ("inspect", folder): "LoRA, rank 2, scaling 2: 80 modules",
        ("inspect", folder, folder): "the same adapter: ",
        ("check", "damaged"): "1 error, 1 warning in damaged/",
        ("check", "healthy", "damaged"): "2 adapters: ",
        ("show", trace): "A: 4 of 4 modules took effect; B: 2 of 2",
        ("compare", answered, answered): "the traces ",
    }
    for words, beginning in cases.items():
        status, out, error = call(*words, "-q", capsys=capsys)
        assert out.startswith(beginning), words
        assert out.count("\n") == 1
        assert error == ""
        full = call(*words, capsys=capsys)
        assert full[0] == status
        assert full[1].splitlines()[0] == out.rstrip("\n")


def test_quiet_keeps_errors_and_formats(tmp_path: Path, capsys: Any) -> None:
    status, out, error = call("show", tmp_path / "none", "-q", capsys=capsys)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")
    folder = adapter_of(tmp_path / "a", DEEP)
    assert call("inspect", folder, "-q", "--format", "json", capsys=capsys)[1].startswith("{")
    status, _, error = call("inspect", folder, "-q", "-v", capsys=capsys)
    assert status == 2
    assert "not allowed with argument" in error


def test_many_layers_are_strips_and_the_layers_that_matter(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    folder = adapter_of(tmp_path / "a", DEEP)
    _, out, _ = call("inspect", folder, "--norms", capsys=capsys)
    strips = [line.split() for line in out.splitlines() if line.startswith(("q_proj  ▁", "v_proj  ▁")) or "▅" in line]
    assert {name for name, *_ in strips} == {"q_proj", "v_proj"}
    assert all(len("".join(cells)) == 40 for _, *cells in strips)
    assert "38 more layers: -v" in out or "39 more layers: -v" in out
    monkeypatch.setenv("COLUMNS", "40")
    narrow = call("inspect", folder, "--norms", capsys=capsys)[1]
    assert "layers 0-31" in narrow
    assert "layers 32-39" in narrow
    monkeypatch.delenv("COLUMNS")
    _, every, _ = call("inspect", folder, "--norms", "-v", capsys=capsys)
    assert sum(line.split()[:1] == [str(layer)] for layer in range(40) for line in every.splitlines()) == 40
    assert "more layers" not in every


def test_a_layer_in_which_something_is_wrong_is_listed(tmp_path: Path, capsys: Any) -> None:
    from safetensors.numpy import load_file, save_file

    folder = adapter_of(tmp_path / "a", DEEP)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.17.self_attn.v_proj.lora_B.weight"][0, 0] = np.nan
    save_file(tensors, path)
    out = call("inspect", folder, "--norms", capsys=capsys)[1]
    assert any(line.split()[:1] == ["17"] and "not finite" in line for line in out.splitlines())
    strip = next(line for line in out.splitlines() if line.startswith("v_proj") and "!" in line)
    assert strip.split()[1][17] == "!"
