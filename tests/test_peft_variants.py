"""PEFT's variants of LoRA by their own formulas: BD-LoRA, KaSA, MonteCLoRA, VeLoRA, MiCA, lora_bias, DoRA of
embeddings, and Activated LoRA, which is not active everywhere.

No engine, no training: real PEFT around two `Linear`s, damaged by hand; Activated LoRA also in the engine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import edited, record_peft
from safetensors.numpy import save_file
from test_peft_kinds import TABLE, Words, save, tokens
from test_peft_layers import Q, Run, Tiny, V, vectors

from lora_probe import check, open_trace, parity
from lora_probe.adapter import open_adapter
from lora_probe.adapter.spectrum import pair_spectrum
from lora_probe.ledger import OK, headline

pytestmark = pytest.mark.slow

Damage = Callable[[Any], object]


def config_of(variant: str) -> dict[str, Any]:
    from peft.tuners.lora import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    return {
        "BD-LoRA": {
            "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)
        },
        "KaSA": {"kasa_config": KasaConfig()},
        "MonteCLoRA": {"monteclora_config": MontecloraConfig()},
        "VeLoRA": {"velora_config": VeloraConfig(num_groups=4)},
        "MiCA": {"init_lora_weights": "mica"},
        "lora_bias": {"lora_bias": True},
    }[variant]


@pytest.fixture(params=["BD-LoRA", "KaSA", "MonteCLoRA", "VeLoRA", "MiCA", "lora_bias"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(tmp_path / "a", Tiny(), target_modules=["q_proj", "v_proj"], **config_of(request.param))


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Run:
    running = Run(tmp_path / "run", adapter)
    running.load.judge_slots("after loading")
    return running


def test_a_healthy_variant(run: Run) -> None:
    run.steps()
    trace = open_trace(run.folder)
    ((_, ledger),) = trace.loads
    assert ledger.healthy
    (agree,) = (event for event in trace.events if event.stage == "agree")
    assert 0 < max(error for error, *_ in agree.facts["errors"].values()) < 1e-6


def test_it_has_a_norm(adapter: Path) -> None:
    """That of the matrix that PEFT adds, and not of the tensors as they are stored."""
    from peft import PeftModel

    checkpoint, live = open_adapter(adapter), PeftModel.from_pretrained(Tiny(), str(adapter)).base_model.model
    for pair in checkpoint.modules:
        layer = getattr(live, pair.module)
        before = layer.base_layer.weight.detach().clone()
        layer.merge(safe_merge=True)
        spectrum = pair_spectrum(checkpoint, pair)
        assert spectrum is not None
        assert spectrum.norm == pytest.approx(float((layer.base_layer.weight - before).norm()), rel=1e-4)


@pytest.mark.parametrize("factor", [1.01, 0.0])
def test_a_variant_that_computes_something_else(run: Run, factor: float) -> None:
    layer = run.layer()
    variant = layer.lora_variant.get("default")
    if variant is None:
        original = layer.lora_B["default"].forward
        layer.lora_B["default"].forward = lambda x: original(x) * factor
    else:
        forward = type(variant).forward

        def scaled(module: Any, active_adapter: str, x: Any, result: Any, **options: Any) -> Any:
            base = result.clone()
            return (
                base + (forward(module, active_adapter=active_adapter, x=x, result=result, **options) - base) * factor
            )

        layer.lora_variant["default"] = type("Damaged", (type(variant),), {"forward": staticmethod(scaled)})()
        type(layer.lora_variant["default"]).__name__ = type(variant).__name__
    run.steps()
    assert run.finding(Q, "placed") == OK
    assert run.finding(Q, "agrees").code == "LP604"
    assert run.finding(V, "agrees") == OK


@pytest.mark.parametrize("variant", ["BD-LoRA", "MonteCLoRA"])
def test_a_small_contribution_in_bfloat16(variant: str, tmp_path: Path) -> None:
    """It is rounded to the size of the base output there, and BD-LoRA is added in place."""
    adapter = save(tmp_path / "a", Tiny(), target_modules=["q_proj", "v_proj"], **config_of(variant))
    small = edited(adapter, tmp_path / "small", config=lambda raw: raw | {"lora_alpha": 0.01})
    run = Run(tmp_path / "run", small, model=lambda: Tiny().bfloat16())
    run.load.judge_slots("after loading")
    run.steps(inputs=lambda rows: vectors(rows).bfloat16())
    assert [run.finding(key, "agrees") for key in (Q, V)] == [OK, OK]


def test_weights_that_change_after_loading(run: Run) -> None:
    with torch.no_grad():
        run.layer().lora_A["default"].weight *= 1.01
    run.load.judge_slots("when the run ended")
    run.steps()
    assert run.finding(Q, "placed").message.startswith("lora_A differs from the file by 0.01 relative")
    assert run.finding(Q, "agrees").code == "LP604"


THIRD: list[tuple[str, Damage, str]] = [
    ("KaSA", lambda layer: layer.lora_diag["default"].data.mul_(1.01), "the diagonal"),
    ("lora_bias", lambda layer: layer.lora_B["default"].bias.data.mul_(1.01), "the bias of lora_B"),
]


@pytest.mark.parametrize(("variant", "damage", "words"), THIRD, ids=[name for name, *_ in THIRD])
def test_a_third_tensor_that_differs(variant: str, damage: Damage, words: str, tmp_path: Path) -> None:
    adapter = save(tmp_path / "a", Tiny(), target_modules=["q_proj", "v_proj"], **config_of(variant))
    run = Run(tmp_path / "run", adapter)
    damage(run.layer())
    run.load.judge_slots("after loading")
    run.steps()
    assert run.finding(Q, "placed").message.startswith(f"{words} differs from the file by 0.01 relative")
    assert run.finding(Q, "agrees").code == "LP604"
    assert [run.finding(V, station) for station in ("placed", "agrees")] == [OK, OK]


@pytest.mark.parametrize(("variant", "field"), [("KaSA", "kasa_config"), ("lora_bias", "lora_bias")])
def test_a_third_tensor_without_its_flag_is_not_applied(variant: str, field: str, tmp_path: Path) -> None:
    """PEFT drops it, and so does the reference; LP211 reports it."""
    adapter = save(tmp_path / "a", Tiny(), target_modules=["q_proj", "v_proj"], **config_of(variant))
    plain = edited(adapter, tmp_path / "plain", config=lambda raw: raw | {field: None})
    run = Run(tmp_path / "run", plain)
    run.load.judge_slots("after loading")
    run.steps()
    assert [run.finding(key, "agrees") for key in (Q, V)] == [OK, OK]
    assert "LP211" in {diagnostic.code for diagnostic in check(plain).diagnostics}


@pytest.fixture
def words(tmp_path: Path) -> Run:
    adapter = save(tmp_path / "a", Words(), target_modules=["embed"], use_dora=True)
    running = Run(tmp_path / "run", adapter, model=Words)
    running.load.judge_slots("after loading")
    return running


def test_dora_on_an_embedding(words: Run) -> None:
    words.steps(inputs=tokens)
    assert [words.finding(TABLE, station) for station in ("placed", "agrees")] == [OK, OK]


def test_dora_on_an_embedding_with_other_magnitudes(words: Run) -> None:
    words.layer(TABLE).lora_magnitude_vector["default"].weight.data *= 1.01
    words.load.judge_slots("when the run ended")
    words.steps(inputs=tokens)
    assert words.finding(TABLE, "placed").message.startswith("the magnitude vector differs from the file")
    assert words.finding(TABLE, "agrees").code == "LP604"


# What check and parity say of them.


def on_llama(llama: Path, folder: Path, variant: str, **more: Any) -> Path:
    """An adapter of `variant` on a language model."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama)
    targets = ["q_proj", "v_proj"]
    config = config_of(variant) if variant != "aLoRA" else {}
    return save(folder, base, task_type="CAUSAL_LM", target_modules=targets, **config, **more)


@pytest.mark.parametrize("variant", ["BD-LoRA", "KaSA", "MonteCLoRA", "VeLoRA", "MiCA", "lora_bias"])
def test_peft_accepts_it(variant: str, llama: Path, tmp_path: Path) -> None:
    report = check(on_llama(llama, tmp_path / "a", variant), model=str(llama), engines=["peft"])
    assert not [diagnostic for diagnostic in report.diagnostics if diagnostic.code != "LP110"]
    assert report.ledgers["peft"].healthy


@pytest.mark.parametrize("variant", ["BD-LoRA", "MonteCLoRA", "VeLoRA"])
def test_its_merge_is_replayed(variant: str, llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = on_llama(llama, tmp_path / "a", variant)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    report = parity(adapter, merged=tmp_path / "merged", model=str(llama), weights_only=True)
    assert report.verdict == "verified"


def test_a_merge_of_another_number_of_blocks_is_not_judged(llama: Path, tmp_path: Path) -> None:
    blocks = {"use_bdlora": {"target_modules_bd_a": ["q_proj", "v_proj"], "nblocks": 3}}
    adapter = edited(on_llama(llama, tmp_path / "a", "BD-LoRA"), tmp_path / "b", config=lambda raw: raw | blocks)
    assert "LP206" in {diagnostic.code for diagnostic in check(adapter, model=str(llama)).diagnostics}
    shutil.copytree(llama, tmp_path / "merged")
    assert parity(adapter, merged=tmp_path / "merged", model=str(llama), weights_only=True).verdict == "undecided"


@pytest.mark.parametrize("variant", ["MonteCLoRA", "VeLoRA"])
def test_tensors_that_only_training_uses(variant: str, llama: Path, tmp_path: Path) -> None:
    """vLLM refuses their names. Without them it runs the adapter as PEFT does, as the hint says."""
    from safetensors.numpy import load_file, save_file

    adapter = on_llama(llama, tmp_path / "a", variant)
    (found,) = (d for d in check(adapter, model=str(llama)).diagnostics if d.code == "LP110")
    assert found.hint.startswith("only training uses")
    name = found.hint.split("`")[1]
    file = adapter / "adapter_model.safetensors"
    save_file({key: values for key, values in load_file(file).items() if name not in key}, file)
    report = check(adapter, model=str(llama))
    assert not report.diagnostics
    assert report.ledgers["vllm"].healthy


REFUSED: list[tuple[str, dict[str, Any] | bool, str, str]] = [
    ("not an object", True, "LP101", "must be a `BdLoraConfig`"),
    ("no list", {"nblocks": 2}, "LP112", "matches neither"),
    ("one is in no list", {"target_modules_bd_a": ["q_proj"], "nblocks": 2}, "LP112", "matches neither"),
    (
        "both",
        {"target_modules_bd_a": ["q_proj", "v_proj"], "target_modules_bd_b": ["v_proj"]},
        "LP112",
        "overlapping modules",
    ),
]


@pytest.mark.parametrize(("value", "code", "words"), [pytest.param(*rest, id=name) for name, *rest in REFUSED])
def test_lists_of_blocks_that_peft_refuses(value: Any, code: str, words: str, llama: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = edited(
        on_llama(llama, tmp_path / "plain", "aLoRA"), tmp_path / "a", config=lambda raw: raw | {"use_bdlora": value}
    )
    found = check(adapter, model=str(llama), engines=["peft"])
    assert found.diagnostics[0].code == code
    with pytest.raises((ValueError, TypeError), match=words):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter))


@pytest.mark.parametrize(
    "config", [{"kasa_config": {"beta": 1}}, {"use_bdlora": {"target_modules_bd_a": ["patch"], "nblocks": 4}}]
)
def test_a_convolution_of_a_variant_for_matrices(config: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    shapes = {"lora_A.weight": (8, 3, 4, 4), "lora_B.weight": (64, 8, 1, 1), "lora_diag": (8,)}
    tensors = {f"base_model.model.patch.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    raw = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["patch"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    checkpoint = open_adapter(folder)
    assert [pair_spectrum(checkpoint, pair) for pair in checkpoint.modules] == [None]
    assert not check(folder).clean


# Activated LoRA


def test_activated_lora_runs_from_its_invocation_on(llama: Path, tmp_path: Path) -> None:
    """The rows before it are the base model's, and the answer is that of PEFT's own generate."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompt, invocation = "a question &then an answer", tokenizer("&then", add_special_tokens=False).input_ids
    ids = tokenizer(prompt).input_ids
    first = next(at for at in range(len(ids)) if ids[at : at + len(invocation)] == invocation)
    adapter = on_llama(llama, tmp_path / "a", "aLoRA", alora_invocation_tokens=invocation)
    trace = record_peft(adapter, llama, tmp_path / "run.lptrace", prompts=[prompt])
    ((_, ledger),) = trace.loads
    assert ledger.healthy
    rows = trace.rows
    assert rows is not None
    assert (rows.delta_norm[rows.position < first] == 0).all()
    assert (rows.delta_norm[rows.position >= first] > 0).all()
    answer = next(request for request in trace.requests if request.adapter is not None)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter)).eval()
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=len(answer.output_ids))
    assert answer.output_ids == expected[0, len(ids) :].tolist()


def test_activated_lora_without_its_invocation(llama: Path, tmp_path: Path) -> None:
    adapter = on_llama(llama, tmp_path / "a", "aLoRA", alora_invocation_tokens=[5, 6])
    trace = record_peft(adapter, llama, tmp_path / "run.lptrace", prompts=["hello"])
    ((_, ledger),) = trace.loads
    assert "no prompt contains the invocation of this Activated LoRA" in headline(ledger)
    base, answer = trace.requests
    assert base.output_ids == answer.output_ids
