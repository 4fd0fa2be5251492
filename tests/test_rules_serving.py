"""Adapters on other classes and under other flags, checked with recorded answers of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS
from test_predictions import LIMIT, errors
from written import edited, write_adapter, write_base

from lora_probe import check

EXPERTS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("serving") / "moe", "moe")


def test_every_expert_has_a_pair(moe: Path, tmp_path: Path) -> None:
    each = write_adapter(tmp_path / "each", moe, target_modules=EXPERTS)
    report = check(each, model=str(moe), options=LIMIT)
    assert errors(report) == set()
    assert report.ledgers["vllm"].healthy
    missing = edited(each, tmp_path / "b", lambda ts: {n: t for n, t in ts.items() if ".experts.3." not in n})
    report = check(missing, model=str(moe), options=LIMIT)
    assert errors(report) == {"LP309"}
    assert report.ledgers["vllm"].refused


def test_fused_experts_where_vllm_takes_them_one_by_one(moe: Path, tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "a", moe)
    stem = "base_model.model.model.layers.0.mlp.experts"

    def fused(tensors: dict[str, Any]) -> dict[str, Any]:
        a, b = (tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"] for half in "AB")
        return tensors | {
            f"{stem}{inner}.lora_{half}.weight": tensor
            for inner in ("", ".base_layer")
            for half, tensor in (("A", a), ("B", b))
        }

    parameters = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    report = check(edited(made, tmp_path / "b", fused, lambda raw: raw | parameters), model=str(moe), options=LIMIT)
    assert "LP310" in errors(report)
    assert report.ledgers["vllm"].refused


@pytest.mark.parametrize(
    ("parameter", "turned", "version", "code"),
    [
        ("down_proj", False, "0.21.2", ""),
        ("down_proj", True, "0.18.1", "refused"),
        ("gate_up_proj", False, "0.21.2", ""),
        # A square matrix: the shapes are the same in both layouts.
        ("gate_up_proj", True, "0.18.1", "wrong"),
        ("gate_up_proj", True, "", ""),
    ],
)
def test_fused_experts_of_an_older_peft(
    parameter: str, turned: bool, version: str, code: str, moe: Path, tmp_path: Path
) -> None:
    made = write_adapter(tmp_path / "a", moe)
    out, inner = {"gate_up_proj": (128, 128), "down_proj": (128, 64)}[parameter]
    shapes = {"A": (4 * 8, out if turned else inner), "B": (inner if turned else out, 4 * 8)}
    pairs = {
        f"base_model.model.model.layers.{layer}.mlp.experts.lora_{half}.weight": np.ones(shape, np.float32)
        for layer in range(LAYERS)
        for half, shape in shapes.items()
    }
    config = {"target_parameters": [f"mlp.experts.{parameter}"], "peft_version": version or None}
    report = check(
        edited(made, tmp_path / "b", lambda tensors: tensors | pairs, lambda raw: raw | config),
        model=str(moe),
        engines=("peft",),
    )
    ledger = report.ledgers["peft"]
    assert errors(report) == ({"LP327"} if code else set())
    assert ledger.refused == (code == "refused")
    wrong = [row.key for row in ledger.rows if row.fate == "wrong"]
    assert len(wrong) == (LAYERS if code == "wrong" else 0)
    assert {key[1] for key in wrong} <= {parameter}


def test_a_head_that_vllms_class_does_not_name(qwen2: Path, llama: Path, tmp_path: Path) -> None:
    for base, expected in ((qwen2, {"LP306"}), (llama, set())):
        head = write_adapter(tmp_path / base.name, base, target_modules=["q_proj", "lm_head"])
        report = check(head, model=str(base), options=LIMIT)
        assert errors(report) == expected
        assert report.ledgers["peft"].healthy


@pytest.mark.parametrize(
    ("targets", "lost"),
    [
        (["o_proj"], 3 * LAYERS),
        (["gate_proj"], 3 * LAYERS),
        (["k_proj"], 0),
        (["model.layers.0.self_attn.qkv_proj"], 6),
    ],
)
def test_a_filter_of_the_deployment_drops_modules(targets: list[str], lost: int, adapter: Path, llama: Path) -> None:
    report = check(adapter, model=str(llama), options=LIMIT | {"lora_target_modules": targets})
    assert errors(report) == ({"LP404"} if lost else set())
    assert report.ledgers["vllm"].count("lost") == lost
    assert report.ledgers["peft"].healthy


def test_ranks_and_their_limits(llama: Path, tmp_path: Path) -> None:
    high = write_adapter(tmp_path / "a", llama, r=32)
    report = check(high, model=str(llama))
    assert [(one.code, one.severity) for one in report.diagnostics] == [("LP403", "warning")]
    assert report.ledgers["vllm"].healthy
    assert not check(high, model=str(llama), options={"max_lora_rank": 32}).diagnostics
    assert errors(check(high, model=str(llama), options={"max_lora_rank": 16})) == {"LP402"}


def test_what_old_versions_ignore(llama: Path, tmp_path: Path) -> None:
    patterns = write_adapter(tmp_path / "a", llama, alpha_pattern={"v_proj": 32})
    for version, expected in (("0.31", {"LP407"}), ("0.32", set())):
        report = check(patterns, model=str(llama), vllm_version=version)
        assert errors(report) == expected
        assert report.ledgers["vllm"].count("wrong") == (LAYERS if expected else 0)
    pissa = write_adapter(tmp_path / "b", llama, init_lora_weights="pissa")
    assert errors(check(pissa, model=str(llama), vllm_version="0.31")) == {"LP407"}
    assert errors(check(pissa, model=str(llama), vllm_version="0.33")) == {"LP406"}


def test_classes_and_vocabularies_that_take_no_adapter(adapter: Path, tmp_path: Path) -> None:
    gpt2 = write_base(tmp_path / "gpt2", "gpt2")
    made = write_adapter(tmp_path / "a", gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    assert check(made, model=str(gpt2)).not_served.keys() == {"vllm"}
    report = check(made, model=str(gpt2), engines=["peft", "vllm"])
    assert errors(report) == {"LP411"}
    assert report.ledgers["vllm"].refused
    assert report.ledgers["peft"].healthy
    large = write_base(tmp_path / "large", "large")
    report = check(adapter, model=str(large))
    assert errors(report) == {"LP408"}
    assert report.ledgers["vllm"].refused


def test_a_trained_head_on_a_language_model(llama: Path, tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "a", llama, target_modules=["q_proj"])
    trained = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    head = {"base_model.model.score.weight": np.ones((3, 128), np.float32)}
    scored = edited(made, tmp_path / "b", lambda tensors: tensors | head, lambda raw: raw | trained)
    report = check(scored, model=str(llama), options=LIMIT, engines=["peft", "vllm"])
    assert errors(report) == {"LP409"}
    assert report.ledgers["vllm"].refused
    assert report.ledgers["peft"].healthy


def test_biases_of_the_base_with_and_without_the_flag(adapter: Path, qwen2: Path, tmp_path: Path) -> None:
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float32)}
    for said, expected in (("all", {"LP406"}), ("none", {"LP211"})):
        made = edited(
            adapter, tmp_path / said, lambda tensors: tensors | bias, lambda raw, said=said: raw | {"bias": said}
        )
        assert errors(check(made, model=str(qwen2), options=LIMIT)) == expected


def test_a_target_that_peft_cannot_adapt(adapter: Path, llama: Path, tmp_path: Path) -> None:
    block = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"target_modules": ["q_proj", "self_attn"]})
    report = check(block, model=str(llama), options=LIMIT)
    assert "LP307" in errors(report)
    assert report.ledgers["peft"].refused
    assert not report.ledgers["vllm"].refused


def test_an_engine_that_is_left_out_is_not_judged(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """Neither by a rule about it alone, nor by a finding about it of a rule on both."""
    dora = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"bias": "lora_only"})
    live = edited(
        adapter,
        tmp_path / "b",
        lambda ts: {n.replace(".weight", ".default.weight"): t for n, t in ts.items()},
    )
    for damaged, code in ((dora, "LP406"), (live, "LP219")):
        assert errors(check(damaged, model=str(llama))) == {code}
        report = check(damaged, model=str(llama), engines="peft")
        assert list(report.ledgers) == ["peft"]
        assert report.diagnostics == ()
