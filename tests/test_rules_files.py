"""Files that no engine loads, and names of other modules, checked with recorded answers of engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS
from test_predictions import LIMIT, errors
from test_rules import BROKEN
from written import edited, in_dtype, write_adapter, write_base

from lora_probe import check
from lora_probe.ledger import headline


def codes(report: Any) -> set[str]:
    return {diagnostic.code for diagnostic in report.diagnostics}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_finding_and_a_refusal(name: str, adapter: Path, llama: Path, tmp_path: Path) -> None:
    code, damage = BROKEN[name]
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    damage(folder)
    report = check(folder, model=str(llama))
    assert [diagnostic.code for diagnostic in report.diagnostics] == [code]
    assert report.diagnostics[0].severity == "error"
    for engine, ledger in report.ledgers.items():
        assert ledger.refused
        assert headline(ledger) == f"refused by {engine}: {report.diagnostics[0].message} ({code})"


def test_a_gap_between_layers_is_named_without_a_base(adapter: Path, tmp_path: Path) -> None:
    def deeper(tensors: dict[str, Any]) -> dict[str, Any]:
        first = {name: tensor for name, tensor in tensors.items() if "layers.0." in name}
        return {
            name.replace("layers.0.", f"layers.{layer}."): tensor
            for layer in (0, 1, 2, 4, 5, 6, 7)
            for name, tensor in first.items()
        }

    nameless = edited(adapter, tmp_path / "a", deeper, lambda raw: raw | {"base_model_name_or_path": None})
    report = check(nameless)
    assert codes(report) == {"LP217"}
    assert report.diagnostics[0].message == "layers 0-2, 4-7 have pairs; missing between them: 3"


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [("model.language_model.", set()), ("model.", {"LP302"}), ("language_model.model.", set())],
)
def test_names_on_a_multimodal_model(prefix: str, expected: set[str], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "paligemma")
    made = write_adapter(tmp_path / "a", base, target_modules=r".*language_model.*\.[qkv]_proj")
    named = edited(
        made,
        tmp_path / "b",
        lambda tensors: {name.replace("model.language_model.", prefix): tensor for name, tensor in tensors.items()},
    )
    report = check(named, model=str(base))
    assert errors(report) == expected
    assert [(one.codes, one.why) for one in report.not_run] == [
        (("LP317", "LP320"), "the base model's weights were not found, or are not safetensors files")
    ]
    healthy = 0 if expected else 3 * LAYERS
    assert {ledger.count("took effect") for ledger in report.ledgers.values()} == {healthy}


def test_a_tower_that_vllm_does_not_adapt(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "paligemma")
    made = write_adapter(tmp_path / "a", base, target_modules=r".*\.([qkv]_proj|fc1)")
    old = edited(
        made,
        tmp_path / "b",
        lambda ts: {n.replace("vision_tower.encoder", "vision_tower.vision_model.encoder"): t for n, t in ts.items()},
    )
    new_names, old_names = check(made, model=str(base)), check(old, model=str(base))
    assert errors(new_names) == {"LP303"}
    assert new_names.ledgers["peft"].healthy
    # What vLLM does not have is not expected by the config there.
    by = {row.expected_by for row in new_names.ledgers["vllm"].rows if row.fate == "lost"}
    assert by == {("file",)}
    assert "LP304" in errors(old_names)
    for report in (new_names, old_names):
        lost = [row.module for row in report.ledgers["vllm"].rows if row.fate == "lost"]
        assert lost
        assert all("vision" in module for module in lost)


def test_names_that_vllms_class_skips(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nemotron")
    mtp = edited(
        adapter, tmp_path / "a", lambda ts: {n.replace("model.layers", "mtp.layers"): t for n, t in ts.items()}
    )
    report = check(mtp, model=str(base))
    assert "LP305" in errors(report)
    assert report.ledgers["vllm"].count("took effect") == 0


def test_a_row_keeps_what_was_found_first(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """Half a pair of another rank is half a pair; what is lost at `stored` stays lost there."""
    name = "base_model.model.model.layers.1.self_attn.k_proj"

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        left = {stored: tensor for stored, tensor in tensors.items() if stored != f"{name}.lora_A.weight"}
        return left | {f"{name}.lora_B.weight": tensors[f"{name}.lora_B.weight"][:, :4]}

    report = check(edited(adapter, tmp_path / "a", change), model=str(llama), options=LIMIT)
    assert errors(report) == {"LP202"}
    (row,) = [row for row in report.ledgers["peft"].rows if row.module == "model.layers.1.self_attn.k_proj"]
    assert row.stations["stored"].code == "LP202"


def test_the_config_and_the_file_say_who_expects_a_module(adapter: Path, llama: Path, tmp_path: Path) -> None:
    wider = {"target_modules": ["q_proj", "o_proj"]}
    report = check(edited(adapter, tmp_path / "a", config=lambda raw: raw | wider), model=str(llama), options=LIMIT)
    by = {row.module.rpartition(".")[2]: row.expected_by for row in report.ledgers["vllm"].rows}
    assert by == {"q_proj": ("config", "file"), "k_proj": ("file",), "v_proj": ("file",), "o_proj": ("config",)}
    fates = {row.module.rpartition(".")[2]: row.fate for row in report.ledgers["peft"].rows}
    assert fates == {"q_proj": "took effect", "k_proj": "lost", "v_proj": "lost", "o_proj": "lost"}


def test_the_best_step_is_named(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "checkpoint-500"))
    state = {"best_model_checkpoint": "out/checkpoint-200", "global_step": 500, "max_steps": 500}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert codes(check(folder)) == {"LP218"}


def test_integers_are_converted_as_they_are(adapter: Path, llama: Path, tmp_path: Path) -> None:
    report = check(in_dtype(adapter, tmp_path / "a", "int8"), model=str(llama))
    assert [(found.code, found.severity) for found in report.diagnostics] == [("LP222", "warning")]
    assert all(ledger.healthy for ledger in report.ledgers.values())
