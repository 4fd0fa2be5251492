"""Classifiers: the number of labels, pairs on the head, names of the live model. What PEFT does is tried in PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SIZES
from written import Tensors, edited

from lora_probe import check

LABELS = 5
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base without labels in its config, and a classifier that PEFT trained on it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=LABELS)
    peft_model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft_model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def load(adapter: Path, base: Path, **settings: Any) -> dict[str, Any]:
    """The tensors of the model that PEFT loads."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, **settings)
    state: dict[str, Any] = PeftModel.from_pretrained(model, adapter).state_dict()
    return state


def of_peft(adapter: Path, base: Path) -> dict[str, Any]:
    report = check(adapter, model=str(base))
    return {one.code: one for one in report.diagnostics if "peft" in one.engines} | {"ledger": report.ledgers["peft"]}


def test_a_base_without_labels_is_not_another_base(classifier: tuple[Path, Path]) -> None:
    base, adapter = classifier
    judged = of_peft(adapter, base)
    assert set(judged) == {"LP319", "ledger"}
    assert judged["LP319"].message == (
        "`score` in the file has 5 labels, the base model's config gives 2: "
        "PEFT refuses the adapter unless the base is loaded with num_labels=5"
    )
    assert judged["LP319"].severity == "warning"
    assert judged["ledger"].healthy
    with pytest.raises(RuntimeError, match="size mismatch"):
        load(adapter, base)
    # The hint is followed.
    match = re.search(r"num_labels=(\d+)\)", judged["LP319"].hint)
    assert match is not None
    state = load(adapter, base, num_labels=int(match[1]))
    assert state[f"{PREFIX}score.modules_to_save.default.weight"].shape[0] == LABELS


def test_labels_in_the_config_of_the_base_are_enough(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base, adapter = classifier
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=LABELS).save_pretrained(tmp_path / "base")
    assert set(of_peft(adapter, tmp_path / "base")) == {"ledger"}


def _pair(tensors: Tensors) -> Tensors:
    numbers = np.random.default_rng(0)
    a, b = numbers.normal(size=(8, SIZES["hidden_size"])), numbers.normal(size=(LABELS, 8))
    return tensors | {
        f"{PREFIX}score.lora_A.weight": a.astype(np.float32),
        f"{PREFIX}score.lora_B.weight": b.astype(np.float32),
    }


def _frozen(tensors: Tensors) -> Tensors:
    both = _pair(tensors)
    return {name.replace("score.lora", "score.original_module.lora"): tensor for name, tensor in both.items()}


def _live(tensors: Tensors) -> Tensors:
    return {name.replace("score.", "score.modules_to_save.default."): tensor for name, tensor in tensors.items()}


def _both(tensors: Tensors) -> Tensors:
    return tensors | {f"{PREFIX}score.modules_to_save.weight": tensors[f"{PREFIX}score.weight"] * 2}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "v_proj", "score"]])
def test_a_pair_on_a_head_is_dropped(targets: list[str], classifier: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = classifier
    made = edited(adapter, tmp_path / "a", _pair, config=lambda raw: raw | {"target_modules": targets})
    judged = of_peft(made, base)
    assert set(judged) == {"LP319", "LP321", "ledger"}
    assert {row.module for row in judged["ledger"].rows if row.fate == "lost"} == {"score"}
    assert not [name for name in load(made, base, num_labels=LABELS) if "score" in name and "lora_" in name]


@pytest.mark.parametrize("old", ["lora_A", "base_layer"])
def test_a_pair_in_place_of_a_head_is_refused(old: str, classifier: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = classifier

    def inside(tensors: Tensors) -> Tensors:
        both = _pair(tensors)
        kept = {f"{PREFIX}score.base_layer.weight": both.pop(f"{PREFIX}score.weight")}
        return both | (kept if old == "base_layer" else {})

    made = edited(adapter, tmp_path / "a", inside)
    judged = of_peft(made, base)
    assert set(judged) == {"LP319", "LP321", "ledger"}
    assert judged["ledger"].refused
    with pytest.raises(KeyError, match=r"score\.weight"):
        load(made, base, num_labels=LABELS)


@pytest.mark.parametrize(
    ("edit", "codes", "lands"),
    [(_frozen, set(), False), (_both, {"LP323"}, False), (_live, {"LP322"}, None)],
)
def test_names_of_the_live_model(
    edit: Callable[[Tensors], Tensors],
    codes: set[str],
    lands: bool | None,
    classifier: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    base, adapter = classifier
    made = edited(adapter, tmp_path / "a", edit)
    judged = of_peft(made, base)
    assert set(judged) - {"LP319", "ledger"} == codes
    if lands is None:
        assert judged["ledger"].refused
        with pytest.raises(KeyError):
            load(made, base, num_labels=LABELS)
        # The hint is followed.
        fixed = edited(
            made, tmp_path / "b", lambda ts: {n.replace(".modules_to_save.default", ""): t for n, t in ts.items()}
        )
        assert set(of_peft(fixed, base)) == {"LP319", "ledger"}
        load(fixed, base, num_labels=LABELS)
    else:
        assert judged["ledger"].healthy
        load(made, base, num_labels=LABELS)
