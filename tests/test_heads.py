"""Classifiers as `check` judges them without an engine: labels, pairs on the head, names of the live model.

`test_labels_and_heads.py` holds the same against real PEFT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, SIZES
from written import Tensors, edited, write_adapter, write_base

from lora_probe import check

HEAD, HIDDEN = "base_model.model.score", SIZES["hidden_size"]


def classifier(folder: Path, base: Path, labels: int, **settings: Any) -> Path:
    made = write_adapter(folder.with_name(f"{folder.name}-pairs"), base, task_type="SEQ_CLS", **settings)
    head = np.zeros((labels, HIDDEN), np.float32)
    return edited(made, folder, lambda ts: ts | {f"{HEAD}.weight": head}, lambda raw: raw | {"modules_to_save": SAVED})


SAVED = ["classifier", "score"]


def of_peft(adapter: Path, base: Path) -> set[str]:
    return {one.code for one in check(adapter, model=str(base)).diagnostics if "peft" in one.engines}


@pytest.mark.parametrize(("labels", "reported"), [(1, True), (2, False), (5, True)])
def test_labels(labels: int, reported: bool, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    report = check(classifier(tmp_path / "a", base, labels), model=str(base))
    diagnostics = [one for one in report.diagnostics if one.code == "LP319"]
    assert len(diagnostics) == reported
    assert report.ledgers["peft"].healthy
    if reported:
        assert f"{labels} label{'s' * (labels > 1)}, the base model's config gives 2" in diagnostics[0].message
        assert diagnostics[0].hint == (
            f"load the base model with `LlamaForSequenceClassification.from_pretrained(base, num_labels={labels})`"
        )


def _pair(tensors: Tensors) -> Tensors:
    numbers = np.random.default_rng(0)
    pair = {f"{HEAD}.lora_A.weight": numbers.normal(size=(8, HIDDEN)), f"{HEAD}.lora_B.weight": np.ones((5, 8))}
    return tensors | {name: half.astype(np.float32) for name, half in pair.items()}


def test_a_pair_on_the_head_has_its_labels_too(tmp_path: Path) -> None:
    """Not another base (LP301), although its B has more rows than the head of the base."""
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 5)
    alone = edited(adapter, tmp_path / "b", lambda ts: {n: t for n, t in _pair(ts).items() if n != f"{HEAD}.weight"})
    assert {"LP319", "LP301"} & of_peft(alone, base) == {"LP319"}


def test_another_base_is_not_a_matter_of_labels(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 5)

    def wider(tensors: Tensors) -> Tensors:
        return {n: t if "lora_B" in n else np.concatenate([t, t], axis=1) for n, t in tensors.items()}

    assert {"LP319", "LP301"} & of_peft(edited(adapter, tmp_path / "b", wider), base) == {"LP301"}


@pytest.mark.parametrize("saved", [SAVED, None])
def test_a_pair_on_a_whole_module_is_dropped(saved: list[str] | None, tmp_path: Path) -> None:
    """PEFT adds the heads of a classifier by itself."""
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 2)
    pair = edited(
        adapter,
        tmp_path / "b",
        lambda ts: {n: t[:2] if "score.lora_B" in n else t for n, t in _pair(ts).items()},
        lambda raw: raw | {"modules_to_save": saved},
    )
    report = check(pair, model=str(base))
    assert {row.module: row.stations["placed"].code for row in report.ledgers["peft"].rows if row.fate == "lost"} == {
        "score": "LP321"
    }


@pytest.mark.parametrize("old", ["lora_A", "base_layer"])
def test_a_pair_in_place_of_a_whole_module_is_refused(old: str, tmp_path: Path) -> None:
    """`base_layer`: the head was saved inside of a LoRA layer."""
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 2)

    def inside(tensors: Tensors) -> Tensors:
        both = {n: t[:2] if "score.lora_B" in n else t for n, t in _pair(tensors).items()}
        kept = {f"{HEAD}.base_layer.weight": both.pop(f"{HEAD}.weight")}
        return both | (kept if old == "base_layer" else {})

    made = edited(adapter, tmp_path / "b", inside)
    assert of_peft(made, base) == {"LP321"}
    assert check(made, model=str(base)).ledgers["peft"].refused


def test_the_frozen_copy_is_not_a_lost_module(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 2)
    frozen = edited(
        adapter,
        tmp_path / "b",
        lambda ts: {n.replace("score.lora", "score.original_module.lora"): t for n, t in _pair(ts).items()},
    )
    report = check(frozen, model=str(base))
    assert report.ledgers["peft"].healthy
    assert len(report.ledgers["peft"].rows) == 3 * LAYERS
    assert of_peft(frozen, base) == set()
    # vLLM reads the names alone.
    assert check(frozen, model=str(base), engines=["vllm"]).ledgers["vllm"].refused


@pytest.mark.parametrize("name", ["modules_to_save", "modules_to_save.default"])
def test_a_head_under_the_name_of_the_live_model(name: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 2)
    live = f"{HEAD}.{name}.weight"
    beside = edited(adapter, tmp_path / "b", lambda ts: ts | {live: ts[f"{HEAD}.weight"]})
    assert of_peft(beside, base) == {"LP323"}
    assert not check(beside, model=str(base)).ledgers["peft"].refused
    alone = edited(adapter, tmp_path / "c", lambda ts: {n.replace("score", f"score.{name}"): t for n, t in ts.items()})
    assert of_peft(alone, base) == {"LP322"}
    assert check(alone, model=str(base)).ledgers["peft"].refused
    # The hint is followed.
    fixed = edited(alone, tmp_path / "d", lambda ts: {n.replace(f".{name}", ""): t for n, t in ts.items()})
    assert of_peft(fixed, base) == set()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: t * np.float32("nan"), "LP326"),
        (lambda t: np.tile(t, (1, 2)), "LP324"),
    ],
)
def test_the_values_and_the_shape_of_a_head(change: Any, code: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 2)
    name = f"{HEAD}.weight"
    damaged = edited(adapter, tmp_path / "b", lambda ts: ts | {name: change(ts[name])})
    assert of_peft(adapter, base) == set()
    assert of_peft(damaged, base) == {code}
    assert check(damaged, model=str(base)).ledgers["peft"].refused == (code == "LP324")


def test_a_head_without_its_ending_is_not_in_the_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = classifier(tmp_path / "a", base, 2)
    bare = edited(adapter, tmp_path / "b", lambda ts: {n.replace(f"{HEAD}.weight", HEAD): t for n, t in ts.items()})
    assert of_peft(bare, base) == {"LP212"}


def test_a_name_in_modules_to_save_that_matches_nothing(adapter: Path, llama: Path, tmp_path: Path) -> None:
    odd = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"modules_to_save": ["scoer"]})
    found = [one for one in check(odd, model=str(llama), engines=["peft"]).diagnostics if one.code == "LP108"]
    assert [one.message for one in found] == ["the base model has no module that matches `scoer` in modules_to_save"]
