"""Adapter folders: the config compared with real PEFT, and every tensor in the right module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, edited, save_adapter
from safetensors.numpy import load_file, save_file

from lora_probe import inspect
from lora_probe.adapter import open_config
from lora_probe.errors import UnreadableFile
from lora_probe.names import layer_of, natural, ranges

ONES = np.ones(3, np.float32)
CONFIGS: dict[str, dict[str, Any]] = {
    "list": {},
    "one layer": {"layers_to_transform": [1]},
    "one layer as a number": {"layers_to_transform": 2, "layers_pattern": "layers"},
    "expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded by expression": {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
    "all linear": {"target_modules": "all-linear"},
    "sub-paths": {"target_modules": ["1.mlp.down_proj", "self_attn.o_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 4, r"1.*v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.k_proj": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"k_proj": 2}},
    "saved beside": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_targets_ranks_and_scalings_are_those_of_peft(name: str, llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    from lora_probe.base import open_base

    path = save_adapter(tmp_path / "adapter", llama, **CONFIGS[name])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), path)
    live = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    adapter = inspect(path)
    assert sorted(adapter.config.targeted(open_base(str(llama)).shapes)) == sorted(live)
    assert sorted(module.module for module in adapter.modules) == sorted(live)
    for module in adapter.modules:
        assert module.rank == module.config_rank == live[module.module].r["default"]
        assert module.scaling == live[module.module].scaling["default"]


def test_every_tensor_is_in_the_account_once(adapter: Path, tmp_path: Path) -> None:
    strange = {
        "base_model.model.lm_head.weight": "a whole parameter (modules_to_save)",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": "trained tokens",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": "a tensor of the base model",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": "of the same module",
        "base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector": "without lora_A and lora_B",
        "hello": "not understood",
    }
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    changed = edited(adapter, tmp_path / "strange", lambda t: t | dict.fromkeys((*strange, extra), ONES))
    found = inspect(changed)
    account = [t.name for m in found.modules for t in m.tensors] + [o.tensor.name for o in found.others]
    assert sorted(account) == sorted(load_file(changed / "adapter_model.safetensors"))
    assert len(found.modules) == 3 * LAYERS
    what = {other.tensor.name: other.what for other in found.others}
    assert all(word in what[name] for name, word in strange.items())
    unclear = {"hello", *(name for name in strange if "lora_A.default" in name or "o_proj" in name)}
    assert {o.tensor.name for o in found.others if not o.understood} == unclear


def test_dora_and_bias_are_extras(llama: Path, tmp_path: Path) -> None:
    found = inspect(save_adapter(tmp_path / "dora", llama, use_dora=True))
    assert {len(module.extras) for module in found.modules} == {1}
    assert found.config.variants == ("DoRA",)
    found = inspect(save_adapter(tmp_path / "bias", llama, lora_bias=True))
    assert {module.extras[0].name.rpartition(".lora_")[2] for module in found.modules} == {"B.bias"}


def test_keys_without_the_prefix(adapter: Path, tmp_path: Path) -> None:
    bare = edited(adapter, tmp_path / "bare", lambda t: {n.removeprefix("base_model.model."): v for n, v in t.items()})
    assert [m.module for m in inspect(bare).modules] == [m.module for m in inspect(adapter).modules]


def test_the_last_checkpoint_of_a_training_folder(adapter: Path, tmp_path: Path) -> None:
    for step in (5, 40, 100):
        shutil.copytree(adapter, tmp_path / f"checkpoint-{step}")
    found = inspect(tmp_path)
    assert found.path.name == "checkpoint-100"
    assert "checkpoint-5, checkpoint-40, checkpoint-100" in found.notes[0]


def test_an_adapter_saved_under_its_name_is_pointed_at(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "default")
    with pytest.raises(UnreadableFile, match=r"adapter_config\.json is not in it but in default") as caught:
        inspect(tmp_path)
    assert str(tmp_path / "default") in caught.value.hint


def test_a_link_out_of_the_folder_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "linked")
    weights = tmp_path / "linked" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(adapter / "adapter_model.safetensors")
    with pytest.raises(UnreadableFile, match="leads out of its folder"):
        inspect(tmp_path / "linked")


def test_links_of_the_hub_cache_are_followed(adapter: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    shutil.copytree(adapter, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    assert len(inspect(snapshot).modules) == 3 * LAYERS


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not valid JSON: .* line 1"),
        ("[]", "holds a JSON list"),
        ('{"fine_tune_type": "lora", "lora_parameters": {}}', "an MLX adapter, not a PEFT config"),
        ('{"peft_type": "PREFIX_TUNING"}', "a PREFIX_TUNING adapter, not LoRA"),
        ('{"peft_type": "LORA", "r": "8"}', "`r` is '8', not a number"),
        ('{"peft_type": "LORA", "r": 0}', "whole number, at least 1"),
        ('{"peft_type": "LORA", "lora_alpha": null}', "`lora_alpha` is None"),
        ('{"peft_type": "LORA", "target_modules": "("}', "not a valid regular expression"),
        ('{"peft_type": "LORA", "target_modules": 5}', "neither a list"),
        ('{"peft_type": "LORA", "rank_pattern": {"(": 4}}', "`rank_pattern` is not a valid regular expression"),
        ('{"peft_type": "LORA", "rank_pattern": [4]}', "not an object"),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer, not JSON"),
        ('{"peft_type": "LORA", "r": 1' + "0" * 400 + "}", "`r` is 1000.*not a number"),
        ('{"peft_type": "LORA", "lora_alpha": 1' + "0" * 400 + "}", "not a number"),
        ('{"peft_type": "LORA", "target_parameters": 5}', "`target_parameters` is 5, not a list"),
        ('{"peft_type": "LORA", "modules_to_save": 5}', "`modules_to_save` is 5"),
        ('{"peft_type": "LORA", "exclude_modules": "(("}', "not a valid regular expression"),
        ('{"peft_type": "LORA", "layers_to_transform": "3"}', "`layers_to_transform` is '3'"),
        ('{"peft_type": "LORA", "layers_to_transform": ["3"]}', "not a layer number"),
        ("[" * 100000, "not valid JSON"),
    ],
)
def test_bad_configs_are_named(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(UnreadableFile, match=word) as caught:
        open_config(path)
    assert str(path) in caught.value.message


def test_fused_expert_parameters(tmp_path: Path) -> None:
    """Names and patterns as PEFT's ParamWrapper stores them: gate_up_proj under base_layer, down_proj outside."""
    home = "base_model.model.model.layers.0.mlp.experts"
    names = [f"{home}{inner}.lora_{half}.weight" for inner in ("", ".base_layer") for half in "AB"]
    tensors = {name: np.ones((4, 4), np.float32) for name in names}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "alpha_pattern": {"experts.down_proj": 8},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = {module.parameter: module for module in inspect(tmp_path).modules}
    assert {m.module for m in found.values()} == {"model.layers.0.mlp.experts"}
    assert found["gate_up_proj"].stored_as.endswith("experts.base_layer")
    assert (found["gate_up_proj"].scaling, found["down_proj"].scaling) == (1.0, 2.0)


def test_small_words() -> None:
    assert ranges([3, 1, 2, 7]) == "1-3, 7"
    names = ["a.10.q_proj", "a.9.v_proj", "a.9.k_proj", "a.9.q_proj", "a.b"]
    assert sorted(names, key=natural) == ["a.b", "a.9.q_proj", "a.9.k_proj", "a.9.v_proj", "a.10.q_proj"]
    assert (layer_of("model.layers.12.q"), layer_of("lm_head"), layer_of("layer4.q")) == (12, None, None)


def test_a_module_stored_twice_loses_no_tensor(adapter: Path, tmp_path: Path) -> None:
    twice = edited(
        adapter, tmp_path / "a", lambda t: t | {n.removeprefix("base_model.model."): v for n, v in t.items()}
    )
    found = inspect(twice)
    assert len(found.modules) == 3 * LAYERS
    assert len(found.others) == 6 * LAYERS
    assert not any(other.understood for other in found.others)


def test_a_path_that_no_system_takes(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="cannot read"):
        inspect("x" * 5000)
