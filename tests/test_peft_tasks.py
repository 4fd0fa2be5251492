"""Adapters of other tasks than language modelling in PEFT: classifiers, taggers, encoders, and encoder-decoders.

Tiny models of transformers' own classes, and the answers that transformers gives itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import record_peft
from written import write_base

from lora_probe.engines.labels import labelled
from lora_probe.errors import ProbeError
from lora_probe.ledger import headline
from lora_probe.recording import DECODE, PREFILL, Trace

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LAYERS, LABELS = 2, 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A base and its adapter, saved by transformers and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    tokenizer = write_base(tmp_path_factory.mktemp("tokenizer") / "base")

    def make(model: Any, base: Any, task: str, targets: list[str]) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(task)
        base.save_pretrained(folder / "base")
        for file in tokenizer.glob("*token*"):
            (folder / "base" / file.name).write_bytes(file.read_bytes())
        peft_model = get_peft_model(model, LoraConfig(task_type=task, r=4, lora_alpha=8, target_modules=targets))
        torch.manual_seed(0)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        peft_model.save_pretrained(folder / "adapter")
        return folder / "base", folder / "adapter"

    return make


def run(adapter: Path, base: Path, folder: Path) -> Trace:
    trace: Trace = record_peft(adapter, base, folder, prompts=["hello there", "who are you"])
    return trace


def test_a_classifier_with_its_own_number_of_labels(made: Any, tmp_path: Path) -> None:
    """The base has no head, and its config no number of labels: both are in the adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_hidden_layers=LAYERS, pad_token_id=0)
    language = LlamaForCausalLM(config)
    language.save_pretrained(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=LABELS)
    base, adapter = made(model, language, "SEQ_CLS", ["q_proj", "v_proj"])
    trace = run(adapter, base, tmp_path / "run.lptrace")
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{2 * LAYERS} of {2 * LAYERS} modules took effect"
    again = AutoModelForSequenceClassification.from_pretrained(base, num_labels=LABELS, dtype=torch.float32)
    classifier = PeftModel.from_pretrained(again, adapter).eval()
    for request in trace.requests:
        if request.adapter is not None:
            with torch.inference_mode():
                scores = classifier(torch.tensor([request.prompt_ids])).logits[0].log_softmax(-1)
            assert request.output_ids == [int(scores.argmax())]
            assert request.logprobs == [pytest.approx(float(scores.max()), abs=1e-5)]
            assert request.text == f"LABEL_{request.output_ids[0]}"


def test_a_tagger_labels_every_token(made: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForTokenClassification

    model = BertForTokenClassification(BertConfig(**SIZES, num_hidden_layers=LAYERS, num_labels=LABELS))
    base, adapter = made(model, model, "TOKEN_CLS", ["query", "value"])
    trace = run(adapter, base, tmp_path / "run.lptrace")
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{2 * LAYERS} of {2 * LAYERS} modules took effect"
    assert all(len(request.output_ids) == len(request.prompt_ids) for request in trace.requests)


def test_an_encoder(made: Any, tmp_path: Path) -> None:
    """As a language model it would have other names, and no module would be found."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SIZES, num_hidden_layers=LAYERS))
    base, adapter = made(model, model, "FEATURE_EXTRACTION", ["query", "value"])
    trace = run(adapter, base, tmp_path / "run.lptrace")
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{2 * LAYERS} of {2 * LAYERS} modules took effect"
    texts = {(request.prompt, request.adapter is None): request.text for request in trace.requests}
    assert texts[0, True] != texts[0, False]
    assert f"{len(trace.requests[0].prompt_ids)} vectors of 64 numbers" in texts[0, True]


def test_an_encoder_decoder(made: Any, tmp_path: Path) -> None:
    """Modules of the encoder run once for each prompt, those of the decoder for each token, and keys and values of its
    cross attention once for the encoder's rows: none of them counts as missed."""
    import torch
    from peft import PeftModel
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=300, d_model=64, d_ff=128, d_kv=16, num_layers=LAYERS, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(1)
    model = T5ForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    base, adapter = made(model, model, "SEQ_2_SEQ_LM", ["q", "v"])
    trace = run(adapter, base, tmp_path / "run.lptrace")
    ((_, ledger),) = trace.loads
    assert headline(ledger) == f"{6 * LAYERS} of {6 * LAYERS} modules took effect"
    rows = trace.rows
    assert rows is not None
    of_encoder = np.array([module.startswith("encoder.") for module, _, _ in rows.modules])
    assert not np.isnan(rows.delta_norm[rows.phase == PREFILL][:, of_encoder]).any()
    assert np.isnan(rows.delta_norm[rows.phase == DECODE][:, of_encoder]).all()
    again = T5ForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    whole = PeftModel.from_pretrained(again, adapter).eval()
    for request in trace.requests:
        if request.adapter is not None:
            ids = torch.tensor([request.prompt_ids])
            expected = whole.generate(input_ids=ids, do_sample=False, max_new_tokens=len(request.output_ids))
            assert [0, *request.output_ids] == expected[0].tolist()


def test_a_prompt_that_is_too_long_for_an_encoder(made: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SIZES, num_hidden_layers=1, max_position_embeddings=16))
    base, adapter = made(model, model, "FEATURE_EXTRACTION", ["query"])
    with pytest.raises(ProbeError, match="tokens, but the model's context is 16"):
        record_peft(adapter, base, tmp_path / "run.lptrace", prompts=["a" * 40])


@pytest.mark.parametrize(
    ("scores", "labels", "logprobs", "text"),
    [
        ([0.0, 2.0], [1], [-0.126928], "yes"),
        ([[0.0, 2.0], [1.0, 1.0]], [1, 0], [-0.126928, -0.693147], "yes no"),
        # A reward model: a probability of its only label would say nothing.
        ([-3.5], [], [], "score -3.5"),
        ([1000.0, 0.0], [0], [0.0], "no"),
    ],
)
def test_labels(scores: list[Any], labels: list[int], logprobs: list[float], text: str) -> None:
    assert labelled(np.array(scores, np.float32), {0: "no", 1: "yes"}) == (labels, logprobs, text)
