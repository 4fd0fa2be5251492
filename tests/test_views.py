"""Each engine's description of a base model, compared with the live model and the running engine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SharedEngine
from merges import save_model

from lora_probe.adapter import TrainedAs
from lora_probe.base import EngineView, open_base
from lora_probe.base.engine_view import of_headers
from lora_probe.engines import child, remembered
from lora_probe.engines import describing as views
from lora_probe.engines.describing import Views, views_of
from lora_probe.errors import EngineFailed
from lora_probe.prediction.vllm import view_of_headers

TASK = TrainedAs("CAUSAL_LM")


def only_config(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, llama: Path, qwen2: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("views")
    made = {kind: save_model(folder / kind, kind) for kind in ("tied", "gpt2", "mixtral", "moe")}
    return {"llama": llama, "qwen2": qwen2} | made


@pytest.fixture(scope="session")
def asked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Views, Path, Path]:
    """Descriptions by both engines, as `check` requests them, of a folder with only config.json, and their cache."""
    folder, cache = tmp_path_factory.mktemp("asked"), tmp_path_factory.mktemp("cache")
    _variables.update(variables_of_vllm())
    base = only_config(llama, folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.delenv(remembered.NO_CACHE, raising=False)
        return views_of(open_base(str(base)), ["peft", "vllm"], TASK), base, cache


_variables: dict[str, str] = {}
"""Of vLLM, when the engines were asked: an engine in this process sets some more, and a key holds them."""


def variables_of_vllm() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}


def ask_peft(folder: Path, trained: TrainedAs = TASK) -> EngineView:
    from lora_probe.engines.peft.engine import PeftEngine

    return PeftEngine().describe(open_base(str(folder)), trained)


def ask_vllm(folder: Path) -> EngineView:
    """In this process, next to the shared engine."""
    from lora_probe_vllm.engine import VllmEngine

    return VllmEngine().describe(open_base(str(folder)), TASK)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "moe", "mixtral"])
def test_peft_has_the_modules_of_the_live_model(kind: str, models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from lora_probe.engines.peft.models import shapes_of

    live = AutoModelForCausalLM.from_pretrained(models[kind])
    view = ask_peft(models[kind])
    assert set(view.modules) == {name for name, _ in live.named_modules() if name}
    shapes = {name: module.shape for name, module in view.modules.items() if module.shape is not None}
    assert shapes == shapes_of(live)
    assert (view.model, view.vocabulary, view.source) == (type(live).__name__, 288, "engine")
    kinds = {name: module.kind for name, module in view.modules.items() if module.kind in ("head", "experts")}
    fused = {f"model.layers.{n}.mlp.experts": ["gate_up_proj", "down_proj"] for n in range(3)}
    assert kinds == {"lm_head": "head"} | (dict.fromkeys(fused, "experts") if "m" in kind[:1] else {})
    assert view.parameters == (fused if view.experts == "3d" else {})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_adapts_what_the_view_says_and_no_more(kind: str, models: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    for name, module in ask_peft(models[kind]).modules.items():
        if ".1." in name or ".2." in name:
            continue
        live = AutoModelForCausalLM.from_pretrained(models[kind])
        config = LoraConfig(target_modules=f"^{name}$".replace(".", r"\."))
        if module.why_not:
            with pytest.raises(ValueError, match="is not supported"):
                get_peft_model(live, config)
        else:
            get_peft_model(live, config)


def test_peft_takes_the_class_from_the_task(models: dict[str, Path], paligemma: Path, tmp_path: Path) -> None:
    scored = ask_peft(models["llama"], TrainedAs("SEQ_CLS"))
    assert scored.model == "LlamaForSequenceClassification"
    assert scored.modules["score"].shape == (2, 128)
    assert "lm_head" not in scored.modules
    assert (
        ask_peft(models["llama"], TrainedAs("FEATURE_EXTRACTION")).modules["layers.0.self_attn.q_proj"].kind == "linear"
    )
    assert ask_peft(paligemma).model == "PaliGemmaForConditionalGeneration"
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "nobody", "architectures": ["Nobody"]}')
    with pytest.raises(EngineFailed, match="nobody"):
        ask_peft(unknown)


@pytest.mark.parametrize("kind", ["mixtral", "paligemma", "moe", "llama"])
def test_peft_renames_as_the_view_says(kind: str, models: dict[str, Path], paligemma: Path) -> None:
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder = {**models, "paligemma": paligemma}[kind]
    cls = AutoModelForImageTextToText if kind == "paligemma" else AutoModelForCausalLM
    with torch.device("meta"):
        live = cls.from_config(AutoConfig.from_pretrained(folder))
    view = ask_peft(folder)
    names = [
        "model.layers.0.self_attn.q_proj",
        "language_model.model.layers.0.self_attn.q_proj",
        "language_model.lm_head",
        "model.language_model.layers.1.mlp.gate_proj",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "multi_modal_projector.linear",
        "model.layers.0.block_sparse_moe.gate",
        "lm_head",
    ]
    for name in names:
        stored = f"base_model.model.{name}.lora_A.weight"
        converted = convert_peft_adapter_state_dict_for_transformers(live, LoraConfig(), {stored: torch.zeros(2, 2)})
        (found,) = converted
        assert f"base_model.model.{view.renamed(f'{name}.lora_A.weight')}" == found
    assert bool(view.notes) == (kind in ("mixtral", "moe"))


@pytest.mark.engine
def test_vllm_has_the_layers_of_the_running_engine(asked: tuple[Views, Path, Path], engine: SharedEngine) -> None:
    found, _, _ = asked
    assert not found.missing
    view = found.found["vllm"]

    def look(worker: Any) -> Any:
        manager = worker.model_runner.lora_manager._adapter_manager
        placed: dict[str, Any] = {}
        for name, layer in manager.modules.items():
            parts = manager.packed_modules.get(name, [name])
            for index, part in enumerate(parts):
                as_seen = f"{name}[{index}]" if len(parts) > 1 else name
                shape = (layer.lora_b_stacked[index].shape[-2], layer.lora_a_stacked[index].shape[-1])
                placed[part] = (as_seen, len(parts) > 1, shape)
        return placed, sorted(manager.supported_lora_modules), manager.packed_modules_mapping

    ((placed, supported, packing),) = engine.llm.collective_rpc(look)
    adapted = {name: module for name, module in view.modules.items() if not module.why_not}
    assert {name: (module.engine_as, module.packed) for name, module in adapted.items()} == {
        name: seen[:2] for name, seen in placed.items()
    }
    for name, module in adapted.items():
        if module.kind == "linear":
            assert module.shape == placed[name][2]
    assert adapted["lm_head"].shape == adapted["model.embed_tokens"].shape == (288, 128)
    assert view.suffixes == tuple(sorted({part for name in supported for part in packing.get(name, [name])}))
    assert view.modules["model.norm"].why_not == "vLLM does not adapt RMSNorm"
    assert (view.model, view.vocabulary, view.renames, view.experts) == ("LlamaForCausalLM", 288, (), "")


@pytest.mark.engine
def test_vllm_leaves_embeddings_of_qwen2_alone(models: dict[str, Path], engine: SharedEngine) -> None:
    view = ask_vllm(models["qwen2"])
    assert view.modules["model.embed_tokens"].kind == "embedding"
    assert view.modules["model.embed_tokens"].why_not == "vLLM's Qwen2ForCausalLM does not adapt embeddings"
    assert view.modules["lm_head"].why_not == "vLLM's Qwen2ForCausalLM does not adapt the output head"
    assert "embed_tokens" not in view.suffixes
    assert view.modules["model.layers.2.self_attn.v_proj"].engine_as == "model.layers.2.self_attn.qkv_proj[2]"


@pytest.mark.engine
def test_a_quantisation_that_cannot_run_here_changes_no_name(llama: Path, engine: SharedEngine, tmp_path: Path) -> None:
    """bitsandbytes has no kernel on a CPU."""
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    plain, view = ask_vllm(llama), ask_vllm(tmp_path)
    assert "bitsandbytes" in view.notes[0]
    assert (view.modules, view.suffixes) == (plain.modules, plain.suffixes)
    assert ask_peft(tmp_path).modules == ask_peft(llama).modules


@pytest.mark.engine
def test_vllm_names_every_expert(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # In a process of its own: experts have process groups that the shared engine has not made.
    monkeypatch.setenv(remembered.NO_CACHE, "1")
    view = views_of(open_base(str(models["moe"])), ["vllm"], TASK).found["vllm"]
    assert view.experts == "2d"
    down = view.modules["model.layers.1.mlp.experts.3.down_proj"]
    assert (down.kind, down.shape, down.packed) == ("experts", (128, 64), True)
    assert view.modules["model.layers.1.mlp.experts.3.up_proj"].shape == (64, 128)
    assert {"experts", "experts.0.gate_proj", "experts.3.down_proj"} <= set(view.suffixes)


@pytest.mark.engine
def test_vllm_adapts_the_language_model_alone(paligemma: Path, engine: SharedEngine) -> None:
    from vllm.model_executor.models.paligemma import PaliGemmaForConditionalGeneration

    view = ask_vllm(paligemma)
    mapper = PaliGemmaForConditionalGeneration.hf_to_vllm_mapper.get_rename_mapper()
    names = [
        "model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_B.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "lm_head.lora_A.weight",
    ]
    for name in names:
        assert view.renamed(name) == mapper._map_name(name)
    text, tower, plain, _ = ((view.renamed(name) or "").rpartition(".lora_")[0] for name in names)
    assert view.modules[text].why_not == ""
    assert view.modules[tower].why_not.startswith("vLLM adapts the language model of")
    assert plain not in view.modules


def test_names_are_renamed_as_vllm_renames_them() -> None:
    import re

    from transformers.core_model_loading import PrefixChange, WeightRenaming
    from vllm.model_executor.models.utils import WeightsMapper

    from lora_probe_vllm.view import _renames

    scoped = WeightRenaming(r"^(attn|self_attn)\.q$", r"attention.\1.q")
    scoped.scope_prefix, scoped.base_model_prefix = "layers.0", "model"
    mapper = WeightsMapper(
        orig_to_new_renaming=[
            scoped,
            WeightRenaming(["attn.query", "attn.q_lin"], "attn.q"),
            PrefixChange(prefix_to_add="model"),
        ],
        orig_to_new_regex={re.compile(r"LAYERS\.(\d+)", re.IGNORECASE): r"blocks.\1"},
        orig_to_new_substr={".mlp.": ".ffn."},
        orig_to_new_prefix={"model.": "", "blocks": "body.blocks"},
        orig_to_new_suffix={".w": ".weight"},
    )
    view = EngineView("vllm", "", "", {}, renames=tuple(_renames(mapper)))
    starts = ("", "model.", "layers.0.", "model.layers.0.", "Layers.1.mlp.", "model.model.")
    ends = ("attn.q", "self_attn.q", "attn.query.w", "x.attn.q_lin.attn.query", "mlp.up.mlp.w", "model.w")
    for name in (start + end for start in starts for end in ends):
        assert view.renamed(name) == mapper._map_name(name), name


@pytest.mark.engine
def test_a_class_without_lora_is_refused_in_vllms_words(models: dict[str, Path], engine: SharedEngine) -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    view = ask_vllm(models["gpt2"])

    class GPT2LMHeadModel:
        pass

    with pytest.raises(ValueError, match="does not support LoRA") as raised:
        LoRAModelRunnerMixin().load_lora_model(GPT2LMHeadModel(), None, None)
    assert view.refuses == str(raised.value)
    attention = view.modules["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.shape, attention.why_not) == ("linear", (384, 128), view.refuses)
    assert all(module.why_not for module in view.modules.values())


@pytest.mark.engine
def test_an_answer_is_remembered(
    asked: tuple[Views, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, base, cache = asked
    started: list[str] = []
    for name in variables_of_vllm().keys() - _variables.keys():
        monkeypatch.delenv(name)
    for name, value in _variables.items():
        monkeypatch.setenv(name, value)

    def refuse(folder: Path, *_: Any) -> None:
        started.append(json.loads((folder / child.DESCRIBE).read_text())["engine"])
        raise EngineFailed("not now")

    monkeypatch.setattr(views, "run_child", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv(remembered.NO_CACHE, raising=False)
    opened = open_base(str(base))
    assert views_of(opened, ["peft", "vllm"], TASK).found == first.found
    assert started == []
    # Another task, another config: another question.
    assert views_of(opened, ["peft"], TrainedAs("SEQ_CLS")).missing == {"peft": "not now"}
    other = only_config(base, tmp_path / "other")
    (other / "config.json").write_text((base / "config.json").read_text() + "\n")
    assert views_of(open_base(str(other)), ["vllm"], TASK).missing == {"vllm": "not now"}
    assert started == ["peft", "vllm"]
    monkeypatch.setenv(remembered.NO_CACHE, "1")
    assert views_of(opened, ["peft"], TASK).missing
    monkeypatch.delenv(remembered.NO_CACHE)
    for file in cache.rglob("*.json"):
        file.write_bytes(file.read_bytes()[:100])
    assert set(views_of(opened, ["peft", "vllm"], TASK).missing) == {"peft", "vllm"}


def test_a_cache_that_cannot_be_written_is_no_error(
    asked: tuple[Views, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, base, _ = asked
    view = first.found["peft"]

    def answer(folder: Path, *_: Any) -> None:
        views.write_json(folder / child.VIEW, view)

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(views, "run_child", answer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv(remembered.NO_CACHE, raising=False)
    said: list[str] = []
    found = views_of(open_base(str(base)), ["peft", "nobody"], TASK, said.append)
    assert found.found == {"peft": view}
    assert found.missing == {"nobody": "unknown engine `nobody`"}
    assert said == [f"listing the modules of {base.name} in peft"]


def test_asking_imports_no_engine_here() -> None:
    import subprocess

    code = (
        "import sys, lora_probe.engines.describing; print([m for m in ('torch', 'vllm', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_headers_stand_in_for_an_engine(models: dict[str, Path], tmp_path: Path) -> None:
    view = view_of_headers(open_base(str(models["llama"])), "vllm", "because")
    assert view is not None
    assert view.source == "headers"
    assert (
        view.notes[0] == "vllm did not describe the base (because); names and shapes are from the headers of its files"
    )
    assert view.modules["model.layers.0.self_attn.k_proj"].packed
    assert view.modules["model.layers.0.self_attn.k_proj"].shape == (64, 128)
    assert {"q_proj", "down_proj", "gate_proj"} <= set(view.suffixes)
    live = ask_peft(models["llama"])
    for name, module in view.modules.items():
        assert (module.kind, module.shape) == (live.modules[name].kind, live.modules[name].shape)
    tied = of_headers(open_base(str(models["tied"])), "peft", "because")
    assert tied is not None
    assert tied.modules["lm_head"].shape == (288, 128)
    assert tied.suffixes == ()
    gpt2 = of_headers(open_base(str(models["gpt2"])), "peft", "because")
    assert gpt2 is not None
    assert gpt2.modules["transformer.h.0.attn.c_attn"].shape == (384, 128)
    moe = view_of_headers(open_base(str(models["moe"])), "vllm", "because")
    assert moe is not None
    assert moe.modules["model.layers.0.mlp.experts.1.up_proj"].kind == "experts"
    assert {"experts", "experts.1.up_proj"} <= set(moe.suffixes)
    assert view_of_headers(open_base(str(only_config(models["llama"], tmp_path / "bare"))), "vllm", "because") is None
