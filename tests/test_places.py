"""Where a name leads in an engine: prefixes, renames, towers, experts, and what an engine calls the base's modules."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_probe.adapter import Adapter, TrainedAs, open_adapter
from lora_probe.base import EngineView, ModuleView, open_base
from lora_probe.base.engine_view import Rename
from lora_probe.errors import ProbeError
from lora_probe.names import PREFIX
from lora_probe.prediction import peft, predictor, vllm
from lora_probe.prediction.places import aliases, engine_names, place_of
from lora_probe.prediction.predictor import predictors
from lora_probe.prediction.subjects import subject_of
from lora_probe.rules.subject import Place, Serving
from lora_probe.rules.vllm_versions import behaviour

TEXT = Serving(behaviour("0.33"))
"""A vLLM that looks for a text model's names in the parts of a multimodal one."""


def view(*modules: str, **changes: Any) -> EngineView:
    return EngineView(
        "vllm", "0.33.0", "Model", {name: ModuleView("linear", (16, 8), name) for name in modules}, **changes
    )


def adapter_of(folder: Path, names: Iterable[str], config: str = '"target_modules": ["q_proj"]') -> Adapter:
    """An adapter with a pair for each name, prefix included."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 2, {config}}}')
    halves = {"A": np.ones((2, 8), np.float32), "B": np.ones((16, 2), np.float32)}
    tensors = {f"{name}.lora_{half}.weight": values for name in names for half, values in halves.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return open_adapter(folder)


def base_of(folder: Path, names: Iterable[str]) -> Any:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    save_file({f"{name}.weight": np.ones((16, 8), np.float32) for name in names}, folder / "model.safetensors")
    return open_base(str(folder))


def in_vllm(folder: Path, name: str, modules: EngineView) -> Place:
    adapter = adapter_of(folder, [name])
    (place,) = vllm.PREDICTOR.resolve(modules, adapter, TEXT).values()
    return place


def test_a_name_leads_to_the_module_before_its_half() -> None:
    model = view("layers.0.q_proj")
    assert place_of(model, "layers.0.q_proj.lora_A.weight") == Place(
        "layers.0.q_proj", model.modules["layers.0.q_proj"]
    )
    assert place_of(model, "layers.1.q_proj.lora_A.weight") == Place("layers.1.q_proj", None)
    assert place_of(model, None).dropped == "Model drops such names"


def test_a_prefix_that_the_class_adds_is_no_other_name() -> None:
    shapes = dict.fromkeys(("h.0.attn", "head"), (16, 8))
    assert engine_names(view("transformer.h.0.attn", "head"), shapes) == {
        "transformer.h.0.attn": "h.0.attn",
        "head": "head",
    }
    assert engine_names(view("a.h.0.attn", "b.h.0.attn", "head"), shapes) == {"head": "head"}


def test_an_alias_is_another_name_for_a_module_of_the_base(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "a", [f"{PREFIX}text.q_proj"])
    (key,) = [pair.key for pair in adapter.modules]
    model = view("model.q_proj")
    to_model = {key: Place("model.q_proj", model.modules["model.q_proj"])}
    base_names = {"model.q_proj": "q_proj"}
    assert aliases(adapter, {"q_proj": None}, to_model, base_names) == {"text.q_proj": "q_proj"}
    # Not for the base's own module, nor for a module of the engine that the base lacks, nor for a name without one.
    assert aliases(adapter, {"q_proj": None, "text.q_proj": None}, to_model, base_names) == {}
    assert aliases(adapter, {"q_proj": None}, to_model, {}) == {}
    assert aliases(adapter, {"q_proj": None}, {key: Place("model.q_proj", None)}, base_names) == {}


def test_what_peft_cannot_adapt_is_not_expected() -> None:
    model = view("q_proj")
    why_not = ModuleView("other", (16, 8), "norm", why_not="a LayerNorm")
    modules = {**model.modules, "norm": why_not}
    assert peft.shapes_in({"peft": EngineView("peft", "", "Model", modules)}) == {"q_proj": (16, 8)}


def test_a_fused_parameter_has_its_modules_place_only_there(tmp_path: Path) -> None:
    names = [f"{PREFIX}mlp.experts.base_layer", f"{PREFIX}mlp.experts"]
    adapter = adapter_of(
        tmp_path / "a", names, '"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]'
    )
    assert {pair.parameter for pair in adapter.modules} == {"gate_up_proj", "down_proj"}
    model = view("mlp.experts", parameters={"mlp.experts": ["gate_up_proj"]})
    places = peft.PREDICTOR.resolve(model, adapter, TEXT)
    assert {key[1]: place.module is not None for key, place in places.items()} == {
        "gate_up_proj": True,
        "down_proj": False,
    }


def test_the_shapes_of_a_base_that_no_engine_described(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "a", [f"{PREFIX}model.q_proj"])
    base = base_of(tmp_path / "base", ["model.q_proj"])
    assert subject_of(adapter, TEXT, base).shapes == base.shapes
    assert subject_of(adapter, TEXT).shapes is None
    assert subject_of(adapter, TEXT, base, {"peft": view("q_proj")}).shapes == {"q_proj": (16, 8)}


# vLLM


def test_a_text_models_name_is_tried_on_the_parts(tmp_path: Path) -> None:
    parts = view("language_model.layers.0.q_proj", "vision.layers.0.q_proj", "vision.layers.1.q_proj")
    assert in_vllm(tmp_path / "a", f"{PREFIX}layers.0.q_proj", parts).name == "language_model.layers.0.q_proj"
    assert in_vllm(tmp_path / "b", f"{PREFIX}model.layers.1.q_proj", parts).name == "vision.layers.1.q_proj"
    assert in_vllm(tmp_path / "c", f"{PREFIX}layers.2.q_proj", parts) == Place("layers.2.q_proj", None)


def test_the_name_itself_comes_first(tmp_path: Path) -> None:
    model = view("layers.0.q_proj", "vision.layers.0.q_proj")
    assert in_vllm(tmp_path / "a", f"{PREFIX}layers.0.q_proj", model).name == "layers.0.q_proj"


def test_a_name_that_the_class_drops_is_not_tried_on_the_parts(tmp_path: Path) -> None:
    model = view("language_model.rotary", renames=(Rename("substr", "rotary", None),))
    assert in_vllm(tmp_path / "a", f"{PREFIX}rotary", model).dropped


def test_the_prefix_is_removed_from_names_that_begin_with_it(tmp_path: Path) -> None:
    model = view("q_proj", "text.q_proj")
    assert in_vllm(tmp_path / "a", f"{PREFIX}{PREFIX}q_proj", model).name == "q_proj"
    inside = in_vllm(tmp_path / "b", f"text.{PREFIX}q_proj", model)
    assert inside == Place(f"text.{PREFIX}q_proj", None)


@pytest.mark.parametrize("part", ["model", "tower", ""])
def test_parts_without_a_layer_and_the_model_itself_are_not_tried(tmp_path: Path, part: str) -> None:
    """vLLM tries the parts that hold a layer which it wraps, and not `model`."""
    why_not = "" if part == "model" else "a Conv2d"
    name = f"{part}.layers.0.q_proj".removeprefix(".")
    model = view("text.o_proj", "head")
    modules = {**model.modules, name: ModuleView("linear", (16, 8), name, why_not=why_not)}
    beyond = EngineView("vllm", "", "Model", modules)
    stored = "layers.0.q_proj" if part else "0.q_proj"
    assert in_vllm(tmp_path / "a", f"{PREFIX}{stored}", beyond) == Place(stored, None)


def test_a_base_that_vllm_did_not_describe(tmp_path: Path) -> None:
    linear = base_of(tmp_path / "linear", ["model.layers.0.q_proj", "model.layers.0.o_proj"])
    found = vllm.view_of_headers(linear, "vllm", "not installed")
    assert found is not None
    assert found.suffixes == ("o_proj", "q_proj")
    assert [found.modules[f"model.layers.0.{name}_proj"].packed for name in "qo"] == [True, False]
    experts = base_of(tmp_path / "experts", ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.gate"])
    found = vllm.view_of_headers(experts, "vllm", "not installed")
    assert found is not None
    assert {"experts.3.up_proj", "experts", "gate"} <= set(found.suffixes)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    assert vllm.view_of_headers(open_base(str(tmp_path / "bare")), "vllm", "not installed") is None


# Entry points


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lora_probe.names:PREFIX", "expected a `Predictor`, got `str`"),
        ("lora_probe.prediction.vllm:PREDICTOR", "it is the predictor of `vllm`: both names must be the same"),
    ],
)
def test_an_entry_point_that_is_no_predictor(value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_plugin.py` does the same with a distribution that is installed."""
    point = EntryPoint("peft", value, "lora_probe.predictors")
    monkeypatch.setattr(predictor, "points", lambda group: {"peft": point})
    with pytest.raises(ProbeError) as raised:
        predictors.__wrapped__()
    assert message in raised.value.message


BASE = "whether vLLM serves it depends on the base model"


@pytest.mark.parametrize(
    ("trained", "why"),
    [
        (TrainedAs("CAUSAL_LM"), ""),
        (TrainedAs(), ""),
        (TrainedAs(None, "LlamaForCausalLM"), ""),
        (TrainedAs("SEQ_CLS"), BASE),
        (TrainedAs(None, "WhisperForConditionalGeneration"), BASE),
    ],
)
def test_without_a_base_vllm_is_judged_for_causal_models(trained: TrainedAs, why: str) -> None:
    assert vllm.PREDICTOR.not_served(trained, {}) == why


def test_models_that_vllm_does_not_serve() -> None:
    served, head = view("q_proj"), EngineView("peft", "", "ModelForSequenceClassification", {})

    def why(task: str, **views: EngineView) -> str:
        return vllm.PREDICTOR.not_served(TrainedAs(task), views)

    assert why("CAUSAL_LM", vllm=served, peft=head) == ""
    assert why("SEQ_CLS", vllm=served, peft=head).startswith(
        "vLLM serves this base model as Model, not as the ModelFor"
    )
    assert why("SEQ_CLS", vllm=served, peft=EngineView("peft", "", "Model", {})) == ""
    assert why("CAUSAL_LM", peft=head) == ""
    assert why("CAUSAL_LM", vllm=EngineView("vllm", "", "T5", {}, refuses="no class")) == "no class"
    without = view("q_proj", refuses="no LoRA yet")
    assert why("CAUSAL_LM", vllm=without) == "vLLM serves this base model without adapters (no LoRA yet)"
