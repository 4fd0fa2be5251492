"""Predictions where an engine, a base or a config is not as usual: what is told, and what is called unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from conftest import LAYERS
from test_predictions import LIMIT, errors
from written import DATA, edited, recorded_view, remember_answer, write_adapter, write_base

from lora_probe import check
from lora_probe.ledger import headline

WHOLE = "9 modules read, no problems in the files; effect unknown because"


def test_a_module_of_the_model_that_is_called_as_a_wrapper(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "large")
    for engine in ("peft", "vllm"):
        view = recorded_view("llama", engine)
        modules = {name.replace("self_attn", "module"): module for name, module in view.modules.items()}
        remember_answer(base, engine, msgspec.structs.replace(view, modules=modules))
    named = edited(
        adapter, tmp_path / "a", lambda tensors: {n.replace("self_attn", "module"): t for n, t in tensors.items()}
    )
    report = check(named, model=str(base), options=LIMIT)
    assert errors(report) == set()
    assert all(ledger.healthy for ledger in report.ledgers.values())


def test_peft_renames_what_lacks_the_prefix_on_some_classes(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "paligemma")
    made = write_adapter(tmp_path / "a", base, target_modules=r".*language_model.*\.[qkv]_proj")
    bare = edited(made, tmp_path / "b", lambda ts: {n.removeprefix("base_model.model."): t for n, t in ts.items()})
    assert check(bare, model=str(base)).ledgers["peft"].healthy


def test_an_engine_that_has_no_answer_is_unknown(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "large")
    remember_answer(base, "vllm", "it is on holiday")
    report = check(adapter, model=str(base))
    assert report.ledgers["peft"].healthy
    assert headline(report.ledgers["vllm"]) == f"{WHOLE} the engine's modules for this base model are unknown"
    assert any("it is on holiday" in note for note in report.notes)


def test_without_a_base_all_is_unknown(adapter: Path, tmp_path: Path) -> None:
    nameless = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"base_model_name_or_path": None})
    for ledger in check(nameless).ledgers.values():
        assert headline(ledger) == f"{WHOLE} adapter_config.json does not name a base model"


def test_layers_that_peft_copies_are_not_predicted(adapter: Path, llama: Path, tmp_path: Path) -> None:
    copied = edited(
        adapter,
        tmp_path / "a",
        lambda ts: ts | {n.replace("layers.0", f"layers.{LAYERS}"): t for n, t in ts.items() if "layers.0" in n},
        lambda raw: raw | {"layer_replication": [[0, 2], [1, 3]]},
    )
    rows = [row for row in check(copied, model=str(llama)).ledgers["peft"].rows if f"layers.{LAYERS}." in row.module]
    assert len(rows) == 3
    assert {(row.fate, row.stations["read"].message) for row in rows} == {
        ("unknown", "PEFT copies layers (layer_replication), which is not predicted")
    }


def test_a_wrapper_is_seen_without_a_base(adapter: Path, tmp_path: Path) -> None:
    wrapped = edited(
        adapter,
        tmp_path / "a",
        lambda tensors: {n.replace("self_attn", "_orig_mod.self_attn"): t for n, t in tensors.items()},
        lambda raw: raw | {"base_model_name_or_path": None},
    )
    for ledger in check(wrapped).ledgers.values():
        assert {(row.fate, row.stations["read"].code) for row in ledger.rows} == {("lost", "LP213")}


def test_ranks_are_compared_without_a_base(adapter: Path, tmp_path: Path) -> None:
    wrong = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"base_model_name_or_path": None, "r": 4})
    ledgers = check(wrong).ledgers
    assert (ledgers["peft"].refused, ledgers["peft"].code) == (True, "LP201")
    assert not ledgers["vllm"].refused


def test_shapes_matter_only_where_the_pair_is_placed(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """PEFT goes by the config, vLLM by --lora-target-modules."""
    large = edited(
        adapter,
        tmp_path / "a",
        lambda ts: {n: np.tile(t, (1, 2)) if "v_proj.lora_A" in n else t for n, t in ts.items()},
    )
    narrow = edited(large, tmp_path / "b", config=lambda raw: raw | {"target_modules": ["q_proj"]})
    assert all(ledger.refused for ledger in check(large, model=str(llama)).ledgers.values())
    assert not check(narrow, model=str(llama)).ledgers["peft"].refused
    elsewhere = check(large, model=str(llama), options={"lora_target_modules": ["o_proj"]})
    assert not elsewhere.ledgers["vllm"].refused


def test_a_config_without_targets_needs_a_view_for_pefts_own(adapter: Path, llama: Path, tmp_path: Path) -> None:
    def without(raw: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in raw.items() if key not in ("target_modules", "base_model_name_or_path")}

    bare = edited(adapter, tmp_path / "a", config=without)
    peft = check(bare, model=str(llama)).ledgers["peft"]
    # PEFT's own targets for a Llama are q_proj and v_proj.
    assert {row.module.rpartition(".")[2] for row in peft.rows if row.fate == "took effect"} == {"q_proj", "v_proj"}
    assert {"LP103"} <= errors(check(bare))


def test_fused_experts_have_a_place_in_peft(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "moe")
    fused = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    sizes = {".base_layer": (256 // 2, 128), "": (128, 64)}

    def experts(tensors: dict[str, Any]) -> dict[str, Any]:
        stems = [f"base_model.model.model.layers.{layer}.mlp.experts" for layer in range(LAYERS)]
        return tensors | {
            f"{stem}{inner}.lora_{half}.weight": np.ones((32, wide) if half == "A" else (out, 32), np.float32)
            for stem in stems
            for inner, (out, wide) in sizes.items()
            for half in "AB"
        }

    made = edited(write_adapter(tmp_path / "a", base), tmp_path / "b", experts, lambda raw: raw | fused)
    rows = [row for row in check(made, model=str(base)).ledgers["peft"].rows if row.module.endswith("experts")]
    assert {row.key[1] for row in rows} == {"gate_up_proj", "down_proj"}
    assert {(row.stations["read"].value, row.stations["placed"].value) for row in rows} == {("ok", "ok")}


def test_text_names_on_a_multimodal_model_in_newer_vllm(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "paligemma")
    made = write_adapter(tmp_path / "a", base, target_modules=r".*language_model.*\.[qkv]_proj")
    text = edited(
        made, tmp_path / "b", lambda ts: {n.replace("model.language_model.", "model."): t for n, t in ts.items()}
    )
    counts = [
        check(text, model=str(base), vllm_version=v).ledgers["vllm"].count("took effect") for v in ("0.32", "0.33")
    ]
    assert counts == [0, 3 * LAYERS]


def test_without_peft_shapes_are_the_files(adapter: Path, llama: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "llama", use_cache=False)
    remember_answer(base, "peft", "it is on holiday")
    report = check(adapter, model=str(base), options=LIMIT)
    assert report.ledgers["vllm"].healthy
    assert any("it is on holiday" in note for note in report.notes)
    assert report.ledgers["peft"].count("took effect") == 3 * LAYERS


def test_every_base_has_answers_of_both_engines() -> None:
    kinds = [path.parent.name for path in DATA.glob("*/config.json")]
    assert len(kinds) >= 8
    for kind in kinds:
        assert recorded_view(kind, "peft").engine == "peft"
