"""Which module of the base a name in the file means, if its own name is no module there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from written import edited

from lora_probe import check, inspect
from lora_probe.rules.stored import expect

SHAPE = (16, 8)


def homes(folder: Path, names: list[str], shapes: dict[str, tuple[int, int] | None]) -> dict[str, str]:
    """The name of each pair in the file -> the module whose row it has. Each pair is of rank 2 and fits `SHAPE`."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}')
    halves = {"A": np.ones((2, SHAPE[1]), np.float32), "B": np.ones((SHAPE[0], 2), np.float32)}
    tensors = {f"base_model.model.{name}.lora_{half}.weight": t for name in names for half, t in halves.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    rows = expect(inspect(folder), shapes)
    return {row.entry.module: row.module for row in rows if row.entry is not None}


def test_the_module_that_ends_alike_is_meant(tmp_path: Path) -> None:
    shapes = {f"text.layers.{n}.q_proj": SHAPE for n in range(2)} | {"text.head": SHAPE}
    names = ["model.layers.0.q_proj", "model.layers.7.q_proj", "model.head"]
    assert homes(tmp_path / "a", names, shapes) == {
        "model.layers.0.q_proj": "text.layers.0.q_proj",
        "model.layers.7.q_proj": "model.layers.7.q_proj",
        "model.head": "text.head",
    }


def test_a_name_with_a_prefix_too_many_means_the_module_of_its_own_tower(tmp_path: Path) -> None:
    shapes = {f"{tower}.layers.0.q_proj": SHAPE for tower in ("encoder", "decoder")}
    name = "base_model.model.encoder.layers.0.q_proj"
    assert homes(tmp_path / "a", [name], shapes) == {name: "encoder.layers.0.q_proj"}


def test_a_module_of_the_base_means_itself(tmp_path: Path) -> None:
    """Also where a word of its path is one that wrappers add."""
    shapes = {f"{start}layers.0.q_proj": SHAPE for start in ("module.", "")}
    assert homes(tmp_path / "a", ["module.layers.0.q_proj"], shapes) == {
        "module.layers.0.q_proj": "module.layers.0.q_proj"
    }


def test_of_two_pairs_that_mean_one_module_neither_has_it(tmp_path: Path) -> None:
    names = ["a.layers.0.q_proj", "b.layers.0.q_proj"]
    assert homes(tmp_path / "a", names, {"text.layers.0.q_proj": SHAPE}) == {name: name for name in names}


def test_a_module_with_a_pair_of_its_own_is_not_meant_by_another(tmp_path: Path) -> None:
    names = ["a.layers.0.q_proj", "text.layers.0.q_proj"]
    assert homes(tmp_path / "a", names, {"text.layers.0.q_proj": SHAPE}) == {name: name for name in names}


def test_the_tower_is_chosen_once_for_all_names_of_one_beginning(tmp_path: Path) -> None:
    """Layer 0 fits one tower alone, layer 1 fits both."""
    shapes: dict[str, tuple[int, int] | None] = {
        "text.layers.0.q_proj": SHAPE,
        "text.layers.1.q_proj": SHAPE,
        "image.layers.0.q_proj": (3, 3),
        "image.layers.1.q_proj": SHAPE,
    }
    names = [f"model.layers.{n}.q_proj" for n in range(2)]
    assert set(homes(tmp_path / "a", names, shapes).values()) == {"text.layers.0.q_proj", "text.layers.1.q_proj"}
    shapes["image.layers.0.q_proj"] = SHAPE
    assert set(homes(tmp_path / "b", names, shapes).values()) == set(names)


def test_of_very_many_towers_none_is_meant(tmp_path: Path) -> None:
    name = "model.layers.0.q_proj"
    for count, home in ((100, "t0.layers.0.q_proj"), (101, name)):
        shapes: dict[str, tuple[int, int] | None] = {f"t{n}.layers.0.q_proj": (3, 3) for n in range(count)}
        shapes["t0.layers.0.q_proj"] = SHAPE
        assert homes(tmp_path / str(count), [name], shapes) == {name: home}


def test_what_is_found_of_a_pair_is_told_of_the_row_that_it_shares(adapter: Path, llama: Path, tmp_path: Path) -> None:
    dead = edited(
        adapter,
        tmp_path / "a",
        lambda tensors: {name.replace("model.layers", "model.text.layers"): t for name, t in tensors.items()},
        lambda raw: raw | {"alpha_pattern": {"v_proj": 32}},
    )
    ledger = check(dead, model=str(llama), vllm_version="0.31").ledgers["vllm"]
    (row,) = [row for row in ledger.rows if row.module == "model.layers.1.self_attn.v_proj"]
    assert row.stored_as == "model.text.layers.1.self_attn.v_proj"
    assert [finding.code for finding in row.stations.values()] == ["", "LP302", "LP407"]


def test_both_towers_are_found_where_all_names_lack_a_part(tmp_path: Path) -> None:
    """Cross-attention tells the decoder from the encoder, self-attention does not."""
    inner = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}
    paths = [f"{tower}.layers.0.{kind}.q_proj" for tower, kinds in inner.items() for kind in kinds]
    shapes: dict[str, tuple[int, int] | None] = {f"model.{path}": SHAPE for path in paths}
    assert homes(tmp_path / "a", paths, shapes) == {path: f"model.{path}" for path in paths}
    longer = [f"outer.model.{path}" for path in paths]
    assert homes(tmp_path / "b", longer, shapes) == {path: path.removeprefix("outer.") for path in longer}


def test_a_name_without_a_layer_is_not_of_the_only_layer(tmp_path: Path) -> None:
    assert homes(tmp_path / "a", ["q_proj"], {"text.layers.0.q_proj": SHAPE}) == {"q_proj": "q_proj"}
