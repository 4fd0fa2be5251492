"""Merged models against base plus adapter: PEFT's merges are verified bit for bit, in every kind and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, TARGETS
from merges import damaged, merge_by_peft, save_adapter_of, save_model

from lora_probe.errors import ProbeError
from lora_probe.merging.weights import check_merge

QKV = list(TARGETS)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": QKV}),
    "rslora and patterns": (
        "llama",
        {
            "target_modules": QKV,
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 4},
            "alpha_pattern": {"v_proj": 64},
        },
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "dora": ("llama", {"target_modules": QKV, "use_dora": True}),
    "dora conv1d": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True}),
    "dora embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "lora_bias": ("qwen2", {"target_modules": QKV, "lora_bias": True}),
    "biases": ("qwen2", {"target_modules": QKV, "bias": "lora_only"}),
    "modules_to_save": ("llama", {"target_modules": QKV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved tied embedding": ("tied", {"target_modules": QKV, "modules_to_save": ["embed_tokens"]}),
    "trained tokens": ("llama", {"target_modules": QKV, "trainable_token_indices": [3, 5, 287]}),
    "tied trained tokens": ("tied", {"target_modules": QKV, "trainable_token_indices": [3, 5, 287]}),
    "conv1d and linear, square": ("gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    "all linear, experts too": ("moe", {"target_modules": "all-linear"}),
    "all linear under other names": ("mixtral", {"target_modules": "all-linear"}),
    "experts": ("moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "pissa": ("llama", {"target_modules": QKV, "init_lora_weights": "pissa"}),
    "olora": ("llama", {"target_modules": QKV, "init_lora_weights": "olora"}),
}
GRID = [
    # dtype of the base's files, of the merge, of the adapter's file
    ("float32", "float32", "float32"),
    ("float16", "float16", "float32"),
    ("bfloat16", "bfloat16", "float32"),
    ("float32", "bfloat16", "float16"),
    ("bfloat16", "float32", "bfloat16"),
]
ON_ANOTHER_BASE = ("pissa", "olora")


class Bases:
    """Base models by kind and dtype, made on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, kind: str, dtype: str = "float32") -> Path:
        folder = self.root / f"{kind}-{dtype}"
        return folder if folder.exists() else save_model(folder, kind, dtype)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_merges_is_verified(kind: str, bases: Bases, tmp_path: Path) -> None:
    architecture, config = KINDS[kind]
    for number, (stored, dtype, adapter_dtype) in enumerate(GRID):
        base = bases(architecture, stored)
        adapter = save_adapter_of(tmp_path / f"adapter-{number}", base, adapter_dtype, **config)
        merged = merge_by_peft(tmp_path / f"merged-{number}", adapter, base, dtype)
        report = check_merge(adapter, merged, model=str(base))
        about = f"{kind} {stored} {dtype} {adapter_dtype}: {report.diagnostics}"
        assert report.verdict == "verified", about
        if kind not in ON_ANOTHER_BASE:
            assert all(module.bit_exact for module in report.modules), about
        assert report.effect_kept is not None
        assert report.effect_kept > 0.99, about
        for module in report.modules:
            assert module.scaling is None or module.implied_scaling == pytest.approx(module.scaling), about


def test_every_tensor_of_both_is_looked_at(bases: Bases, tmp_path: Path) -> None:
    base = bases("llama")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=QKV)
    report = check_merge(adapter, merge_by_peft(tmp_path / "merged", adapter, base, "float32"), model=str(base))
    assert len(report.modules) == 3 * LAYERS
    assert report.compared == 3 + 9 * LAYERS
    assert {module.label for module in report.modules} == {
        f"model.layers.{layer}.self_attn.{name}" for layer, name in itertools.product(range(LAYERS), QKV)
    }


@pytest.mark.parametrize(
    ("options", "arithmetic"),
    [
        ({"safe": True}, "PEFT's merge with safe_merge"),
        ({"autocast": False}, "an adapter cast to BF16"),
    ],
)
def test_other_rounding_modes_are_named(
    options: dict[str, bool], arithmetic: str, bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama", "bfloat16")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=QKV)
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "bfloat16", **options)
    report = check_merge(adapter, merged, model=str(base))
    assert report.verdict == "verified"
    assert {(module.bit_exact, module.arithmetic) for module in report.modules} == {(True, arithmetic)}


def test_merged_in_float32_and_saved_in_bfloat16(bases: Bases, tmp_path: Path) -> None:
    import torch

    base = bases("llama")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=QKV)
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    cast = damaged(merged, tmp_path / "cast", lambda tensors: {k: v.to(torch.bfloat16) for k, v in tensors.items()})
    report = check_merge(adapter, cast, model=str(base))
    assert report.verdict == "verified"
    assert all(module.bit_exact for module in report.modules)
    assert {module.arithmetic for module in report.modules} == {"PEFT's merge in F32, saved in BF16"}


def merged_by(bases: Bases, adapter: Path, folder: Path, dtype: str, delta: Callable[[Any, Any], Any]) -> Path:
    """A merge by hand: W + delta(A, B) for every pair, in float32, rounded to the base's dtype."""
    from safetensors.torch import load_file

    pairs = load_file(adapter / "adapter_model.safetensors")

    def edit(tensors: dict[str, Any]) -> dict[str, Any]:
        for name, weight in tensors.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in pairs:
                a, b = (pairs[f"{stem}.lora_{half}.weight"] for half in "AB")
                tensors[name] = (weight.float() + delta(a, b)).to(weight.dtype)
        return tensors

    return damaged(bases("llama", dtype), folder, edit)


def test_a_product_in_16_bits_is_named(bases: Bases, tmp_path: Path) -> None:
    """Factors of bfloat16, their product rounded before and after the scaling: PEFT on a GPU without autocast."""
    import torch

    adapter = save_adapter_of(tmp_path / "adapter", bases("llama"), target_modules=QKV, lora_alpha=12)

    def delta(a: Any, b: Any) -> Any:
        product = (b.bfloat16().float() @ a.bfloat16().float()).bfloat16()
        return (product * torch.tensor(1.5, dtype=torch.bfloat16)).float()

    for dtype in ("float32", "bfloat16"):
        merged = merged_by(bases, adapter, tmp_path / dtype, dtype, delta)
        report = check_merge(adapter, merged, model=str(bases("llama", dtype)))
        assert report.verdict == "verified", report.diagnostics
        assert {(module.bit_exact, module.arithmetic) for module in report.modules} == {(True, "a product in BF16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("strength", [0.05, 5e-3, 5e-4, 5e-5])
def test_another_arithmetic_to_the_same_effect(dtype: str, strength: float, bases: Bases, tmp_path: Path) -> None:
    """TF32, as a GPU may multiply: 10 bits of each factor. Other bits, the same effect, no wrong scaling."""
    import torch

    adapter = save_adapter_of(tmp_path / "adapter", bases("llama"), strength=strength, target_modules=QKV)

    def tf32(values: Any) -> Any:
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    merged = merged_by(bases, adapter, tmp_path / "merged", dtype, lambda a, b: 2 * (tf32(b) @ tf32(a)))
    report = check_merge(adapter, merged, model=str(bases("llama", dtype)))
    assert all(module.status == "verified" for module in report.modules), report.diagnostics
    assert {diagnostic.code for diagnostic in report.diagnostics} <= {"LP707"}
    if dtype == "float32":
        assert not any(module.bit_exact for module in report.modules)


def test_sharded_and_pickled(bases: Bases, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    base = bases("llama", "bfloat16")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=QKV)
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "bfloat16", max_shard_size="200KB")
    assert len(list(merged.glob("*.safetensors"))) > 2
    assert check_merge(adapter, merged, model=str(base)).verdict == "verified"
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    tensors = {k: v for file in merged.glob("*.safetensors") for k, v in load_file(file).items()}
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "config.json").write_bytes((merged / "config.json").read_bytes())
    report = check_merge(adapter, pickled, model=str(base))
    assert report.verdict == "verified"
    assert all(module.bit_exact for module in report.modules)


@pytest.mark.parametrize(
    ("ratio", "kept", "code"), [(5.1e-2, (0.99, 1.01), None), (5e-4, (0.2, 0.4), "LP707"), (2e-3, (0.7, 0.9), "LP707")]
)
def test_rounding_is_called_rounding(
    ratio: float, kept: tuple[float, float], code: str | None, bases: Bases, tmp_path: Path
) -> None:
    """‖ΔW‖/‖W‖ of 5e-4 keeps about 0.3 of its effect in bfloat16: no other scaling, and no fault of the exporter."""
    base = bases("llama", "bfloat16")
    # W is N(0, 0.02²); A is uniform with a deviation of 1/sqrt(3·128).
    strength = ratio * 0.02 * (3 * 128) ** 0.5 / (2 * 8**0.5)
    adapter = save_adapter_of(tmp_path / "adapter", base, strength=strength, target_modules=QKV)
    report = check_merge(adapter, merge_by_peft(tmp_path / "merged", adapter, base, "bfloat16"), model=str(base))
    assert all(module.bit_exact and module.status == "verified" for module in report.modules)
    assert all(module.implied_scaling == module.scaling for module in report.modules)
    assert report.effect_kept is not None
    assert kept[0] < report.effect_kept < kept[1]
    assert [d.code for d in report.diagnostics] == ([code] if code else [])
    assert report.verdict == ("differs" if code else "verified")


def test_a_quantised_base_is_what_transformers_makes_of_it(bases: Bases, tmp_path: Path) -> None:
    """Blockwise FP8: merged into the result of `dequantize=True`, and checked against that."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    plain = bases("llama", "bfloat16")
    base = damaged(plain, tmp_path / "fp8", quantised_to_fp8, quantization_config=FP8)
    adapter = save_adapter_of(tmp_path / "adapter", plain, target_modules=QKV)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    tensors = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    merged = damaged(plain, tmp_path / "merged", lambda _: dict(tensors))
    report = check_merge(adapter, merged, model=str(base))
    assert report.verdict == "verified", report.diagnostics
    assert all(module.bit_exact for module in report.modules)
    assert check_merge(adapter, merged, model=str(plain)).verdict == "differs"


def test_a_quantisation_that_cannot_be_undone_is_refused_by_name(bases: Bases, tmp_path: Path) -> None:
    base = damaged(
        bases("llama"), tmp_path / "base", lambda t: t, quantization_config={"quant_method": "gptq", "bits": 4}
    )
    adapter = save_adapter_of(tmp_path / "adapter", bases("llama"), target_modules=QKV)
    with pytest.raises(ProbeError, match=r"quantised \(gptq\), and transformers cannot dequantise them here"):
        check_merge(adapter, bases("llama"), model=str(base))


FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}


def quantised_to_fp8(tensors: dict[str, Any]) -> dict[str, Any]:
    """Projections in blocks of 128 × 128, each with its own scale."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        if not name.endswith("proj.weight"):
            found[name] = tensor
            continue
        padded = torch.nn.functional.pad(tensor.float(), (0, -tensor.shape[1] % 128, 0, -tensor.shape[0] % 128))
        blocks = padded.unfold(0, 128, 128).unfold(1, 128, 128)
        scale = blocks.abs().amax((-1, -2)) / 448
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: tensor.shape[0], : tensor.shape[1]]
        found[name] = (tensor.float() / wide).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scale
    return found


def train_and_merge(make: Callable[[], Any], folder: Path, **config: Any) -> None:
    """An adapter on a model that is built in code, and PEFT's merge of the two, in `adapter` and `merged`."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(make(), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "adapter")
    PeftModel.from_pretrained(make(), folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")


@pytest.mark.parametrize("saved", [(), ("embed_tokens", "lm_head")])
def test_a_vocabulary_that_grew(saved: tuple[str, ...], bases: Bases, tmp_path: Path) -> None:
    """Tokens were added before training: the adapter stores embeddings of another size."""
    import torch
    from transformers import AutoModelForCausalLM

    def grown() -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(bases("llama"))
        model.resize_token_embeddings(300)
        return model

    train_and_merge(grown, tmp_path, target_modules=QKV, modules_to_save=list(saved) or None)
    report = check_merge(tmp_path / "adapter", tmp_path / "merged", model=str(bases("llama")))
    assert report.verdict == "verified", report.diagnostics


def test_a_classifier_s_head(bases: Bases, tmp_path: Path) -> None:
    """The base has a language head, the merged model the adapter's own classifier."""
    import torch
    from transformers import AutoModelForSequenceClassification

    def classifier() -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(bases("llama"), num_labels=3)

    train_and_merge(classifier, tmp_path, task_type="SEQ_CLS", target_modules=QKV)
    report = check_merge(tmp_path / "adapter", tmp_path / "merged", model=str(bases("llama")))
    assert report.verdict == "verified", report.diagnostics
    assert "score" in {module.label for module in report.modules}


def test_tied_weights_written_twice(bases: Bases, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base = bases("tied")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=QKV)
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "float32")
    twice = tmp_path / "twice"
    twice.mkdir()
    state = AutoModelForCausalLM.from_pretrained(merged).state_dict()
    assert "lm_head.weight" in state
    torch.save(state, twice / "pytorch_model.bin")
    (twice / "config.json").write_bytes((merged / "config.json").read_bytes())
    report = check_merge(adapter, twice, model=str(base))
    assert report.verdict == "verified", report.diagnostics


def test_a_base_that_was_rounded_on_the_way(bases: Bases, tmp_path: Path) -> None:
    """Stored in float32, loaded and merged in bfloat16, saved in float32."""
    base = bases("llama")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=QKV)
    merged = merge_by_peft(tmp_path / "merged", adapter, base, "bfloat16")
    wide = damaged(
        merged, tmp_path / "wide", lambda tensors: {name: tensor.float() for name, tensor in tensors.items()}
    )
    report = check_merge(adapter, wide, model=str(base))
    assert report.verdict == "verified", report.diagnostics
    assert {module.arithmetic for module in report.modules} == {"PEFT's merge in BF16, saved in F32"}
    assert report.notes == ("the base was rounded to BF16 before it was saved in F32",)


def test_dora_all_in_16_bits(bases: Bases, tmp_path: Path) -> None:
    """Without autocast the magnitude, the norm and their quotient are rounded as well; the effect is the same."""
    base = bases("llama", "bfloat16")
    adapter = save_adapter_of(tmp_path / "adapter", base, target_modules=QKV, use_dora=True)
    report = check_merge(
        adapter, merge_by_peft(tmp_path / "merged", adapter, base, "bfloat16", autocast=False), model=str(base)
    )
    assert report.verdict == "verified", report.diagnostics
