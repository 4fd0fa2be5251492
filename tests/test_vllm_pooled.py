"""Classifiers and embeddings in vLLM's pooling runner, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import LAYERS, record_peft, start_engine
from written import edited

from lora_probe.comparison import compare
from lora_probe.ledger import headline
from lora_probe_vllm.pooled import arguments_for

pytestmark = pytest.mark.engine

LABELS = 3
MODULES = 2 * LAYERS


@pytest.fixture(scope="module")
def classifier(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a classifier with three labels, whose base is a language model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier") / "adapter"
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=LABELS)
    peft_model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft_model.save_pretrained(folder)
    return folder


def test_a_classifier_has_the_same_labels_in_both_engines(classifier: Path, llama: Path, tmp_path: Path) -> None:
    settings = arguments_for(classifier, str(llama))
    assert settings == {"runner": "pooling", "convert": "classify", "hf_overrides": {"num_labels": LABELS}}
    engine = start_engine(llama, tmp_path / "first.lptrace", **settings)
    in_vllm = engine.record(classifier, tmp_path / "run.lptrace", prompts=["hi"])
    in_peft = record_peft(classifier, llama, tmp_path / "peft.lptrace", prompts=["hi"])
    for recorded in (in_vllm, in_peft):
        ((_, ledger),) = recorded.loads
        assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"
    (here,), (there,) = ([r for r in recorded.requests if r.adapter] for recorded in (in_vllm, in_peft))
    assert here.output_ids == there.output_ids
    assert here.logprobs == [pytest.approx(there.logprobs[0], abs=1e-4)]
    assert compare(in_peft, in_vllm).verdict == "agree"


def test_names_that_a_pooling_model_completes_are_not_lost(classifier: Path, llama: Path, tmp_path: Path) -> None:
    """PEFT names the modules of a bare model `layers...`; vLLM's embedding model has `model.layers...`, and finds
    them."""
    bare = edited(
        classifier,
        tmp_path / "bare",
        lambda tensors: {n.replace(".model.model.", ".model."): t for n, t in tensors.items() if "score" not in n},
        lambda raw: raw | {"task_type": "FEATURE_EXTRACTION", "modules_to_save": None},
    )
    settings = arguments_for(bare, str(llama))
    assert settings == {"runner": "pooling", "convert": "embed"}
    engine = start_engine(llama, tmp_path / "first.lptrace", **settings)
    trace = engine.record(bare, tmp_path / "run.lptrace", prompts=["hi"])
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"
    base, adapted = trace.requests
    assert "a vector of 128 numbers" in base.text
    assert base.text != adapted.text
