"""What a hint advises cures: each is followed to the letter, and the adapter is then clean and does what it did before.

In: damages of a healthy adapter. Out: for each, every alternative that the hint of its diagnostic offers, performed on
the field, the modules or the names that the diagnostic states. `NOT_MECHANICAL` lists the rules whose hint needs
somebody who knows more than the files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cures import Patient, follow
from failures import FAILURES, Q0, Maker
from test_fix import FIXABLE
from test_predictions import LIMIT
from written import Tensors, edited, write_adapter

from lora_probe import check
from lora_probe.rules import Diagnostic, all_rules, family_of

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Case:
    """`code` must be the only finding. `healthy`: the settings of the adapter before the damage, `options`: vLLM's."""

    code: str
    damage: Maker
    healthy: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def _config(code: str, healthy: dict[str, Any] | None = None, **changes: Any) -> Case:
    return Case(code, lambda a, base, folder, save: _indented(edited(a, folder), changes), healthy or {})


def _indented(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))
    return folder


def _without(code: str, *names: str) -> Case:
    def damage(healthy: Path, base: Path, folder: Path, save: Any) -> Path:
        return edited(healthy, folder, config=lambda raw: {k: v for k, v in raw.items() if k not in names})

    return Case(code, damage)


def _tensors(code: str, edit: Callable[[Tensors], Tensors], **healthy: Any) -> Case:
    return Case(code, lambda a, base, folder, save: edited(a, folder, edit), healthy)


def _renamed(code: str, old: str, new: str, **healthy: Any) -> Case:
    return _tensors(code, lambda tensors: {n.replace(old, new): t for n, t in tensors.items()}, **healthy)


def _of(name: str) -> Case:
    (code,) = FAILURES[name].codes
    return Case(code, FAILURES[name].maker)


def _twice(healthy: Path, base: Path, folder: Path, save: Any) -> Path:
    path = edited(healthy, folder) / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 8', '"r": 8,\n  "r": 8'))
    return folder


CASES: dict[str, Case] = {
    **{
        name: _of(name)
        for name in (
            *FIXABLE,
            "B01-r-larger",
            "B01-r-smaller",
            "B03-alpha-missing",
            "B03-peft-type-missing",
            "B06-targets-missing",
            "twice-with-and-without-prefix",
            "twice-with-doubled-prefix",
            "D01-rank-above-limit",
        )
    },
    "narrower": _config("LP106", target_modules=["q_proj"]),
    "expression": _config("LP106", target_modules=r".*\.q_proj"),
    "excluded-expression": _config("LP106", exclude_modules=r".*\.1\..*"),
    "excluded-name": _config("LP106", exclude_modules=["v_proj"]),
    "excluded-paths": _config("LP106", exclude_modules=[Q0, "layers.1.self_attn.v_proj"]),
    "layers": _config("LP106", layers_to_transform=[0, 1]),
    "layers-pattern": _config("LP107", layers_to_transform=[0, 1, 2], layers_pattern="blocks"),
    "no-target": _config("LP107", target_modules=["query_key_value"]),
    "all-excluded": _config("LP107", exclude_modules=r".*self_attn.*"),
    "wider": _config("LP204", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "another-config": _config("LP113", r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"]),
    "another-rank-and-wider": _config(
        "LP113", r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    ),
    "another-rank-and-narrower": _config("LP113", r=4, target_modules=["q_proj", "v_proj"]),
    "other-targets": _config("LP113", target_modules=["q_proj", "v_proj", "o_proj"]),
    "task": _config("LP112", task_type="causal_lm"),
    "no-task": _config("LP112", task_type="CHAT"),
    "bias": _config("LP112", bias=None),
    "float-rank": _config("LP112", r=8.0),
    "rank-pattern": _config("LP112", rank_pattern=None),
    "alpha-pattern": _config("LP112", alpha_pattern=None),
    "dropout": _config("LP112", lora_dropout=None),
    "tokens": _config("LP112", trainable_token_indices=[]),
    "expression-and-layers": _config("LP112", target_modules=r".*\.[qkv]_proj", layers_to_transform=[0, 1, 2]),
    "pattern-alone": _config("LP112", layers_pattern="layers"),
    "unknown-init": _config("LP111", init_lora_weights="gausian"),
    "init-in-upper-case": _config("LP111", {"init_lora_weights": "orthogonal"}, init_lora_weights="Orthogonal"),
    "dora-flag": _config("LP220", use_dora=True),
    "key-twice": Case("LP104", _twice),
    "idle-pattern": _config("LP105", alpha_pattern={"q_porj": 16}),
    "embedding": _renamed("LP221", "lora_embedding_B", "lora_B.weight", target_modules=["q_proj", "embed_tokens"]),
    "above-limit": Case("LP402", lambda a, base, folder, save: edited(a, folder), {"r": 32}, {"max_lora_rank": 16}),
    "filtered": Case("LP404", lambda a, base, folder, save: edited(a, folder), {}, {"lora_target_modules": ["o_proj"]}),
}

NOT_MECHANICAL = {
    "LP101": "the file must come from where it was saved",
    "LP102": "it must be converted by the library that wrote it",
    "LP108": "nothing is wrong unless the name is a typo",
    "LP109": "what was subtracted in training is lost",
    "LP110": "an engine must be chosen",
    "LP114": "the value of the training is needed",
    "LP324": "the right base model is needed",
    "LP326": "an earlier checkpoint is needed",
    "LP202": "half of the training is not in the file",
    "LP203": "the training is not in the file; the trained alpha is only known in the training script",
    "LP205": "an earlier checkpoint is needed",
    "LP206": "the weights must be gathered where they were trained",
    "LP207": "files must be moved: `tests/test_adapter.py`",
    "LP208": "the file must be copied again",
    "LP209": "the training is not in the file",
    "LP210": "an engine must be chosen, or the adapter merged",
    "LP211": "the flag of the training must be known",
    "LP212": "tensors are missing in the file",
    "LP217": "it is a question, which a base model answers",
    "LP218": "a checkpoint must be chosen",
    "LP222": "the dtype of the training is needed",
    "LP224": "the right file must be known",
    "LP301": "the right base model is needed",
    "LP303": "the right base model is needed",
    "LP304": "an engine must be chosen, or the adapter merged",
    "LP305": "there is nothing to do",
    "LP306": "an engine must be chosen, or the adapter merged",
    "LP307": "the adapter must be trained again, or its targets known",
    "LP308": "the base model must be resized as in training",
    "LP309": "an engine must be chosen",
    "LP310": "an option of vLLM that check does not have",
    "LP311": "an engine must be chosen",
    "LP312": "the right base model is needed",
    "LP313": "the right base model is needed",
    "LP314": "the right base model is needed",
    "LP315": "an option of vLLM that check does not have",
    "LP316": "there is nothing to do",
    "LP317": "which initialisation it was is only known in the training script",
    "LP318": "there is nothing to do, or the right base model is needed",
    "LP319": "an argument of the script that loads the base: `tests/test_labels_and_heads.py`",
    "LP320": "the right base model is needed",
    "LP321": "the adapter must be trained again",
    "LP322": "vLLM refuses most whole modules: `tests/test_classes.py` cures them in PEFT",
    "LP323": "the trained copy must be known",
    "LP327": "the adapter must be trained again, or merged with another PEFT",
    "LP403": "an option of vLLM, which check takes for granted",
    "LP405": "an option of vLLM, for a GPU",
    "LP406": "an engine must be chosen, or the adapter merged",
    "LP407": "another version of vLLM is needed",
    "LP408": "an engine must be chosen, or the adapter merged",
    "LP409": "a base model with the head is needed",
    "LP410": "its cause is reported beside it, and has the cure",
    "LP411": "an engine must be chosen, or the adapter merged",
}
"""Rules whose hint needs more than the files, each with what it needs."""


def _damaged(name: str, base: Path, folder: Path) -> tuple[Path, Path, list[Diagnostic]]:
    """The adapter before the damage and after it, and the findings."""
    case = CASES[name]
    healthy = write_adapter(folder / "healthy", base, **case.healthy)
    damaged = case.damage(healthy, base, folder / "damaged", write_adapter)
    return healthy, damaged, list(check(damaged, model=str(base), options=LIMIT | case.options).diagnostics)


def _cured(name: str, base: Path, folder: Path) -> list[tuple[str, Path, Path]]:
    """Every alternative that the hint offers, with the healthy adapter and the one that it was performed on."""
    healthy, damaged, (diagnostic,) = _damaged(name, base, folder)
    assert diagnostic.code == CASES[name].code, diagnostic
    patient = Patient(damaged, healthy, base, diagnostic, LIMIT | CASES[name].options)
    followed = []
    for words, cured in follow(patient):
        report = check(cured.folder, model=str(base), options=cured.options)
        assert not [d for d in report.diagnostics if d.severity != "info"], (words, report.diagnostics)
        assert all(ledger.healthy for ledger in report.ledgers.values()), words
        followed.append((words, healthy, cured.folder))
    return followed


@pytest.mark.parametrize("name", CASES)
def test_what_the_hint_advises_cures(name: str, llama: Path, tmp_path: Path) -> None:
    _cured(name, llama, tmp_path)


def test_a_rule_has_a_cure_that_is_tested_or_a_reason() -> None:
    rules = {code for code in all_rules() if family_of(code).in_check and code.startswith("LP")} - {"LP401"}
    tested = {case.code for case in CASES.values()}
    assert tested | NOT_MECHANICAL.keys() == rules
    assert not tested & NOT_MECHANICAL.keys()
    assert {code for code, rule in all_rules().items() if rule.fixable} <= tested | {"LP322"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_cured_does_in_peft_what_it_did_before(name: str, llama: Path, tmp_path: Path) -> None:
    """Its logits, and ΔW of every module: neither a scaling nor a module has changed."""
    import torch

    for words, healthy, cured in _cured(name, llama, tmp_path):
        before, after = _effect(healthy, llama), _effect(cured, llama)
        assert before[0].keys() == after[0].keys(), words
        assert all(torch.equal(before[0][module], after[0][module]) for module in before[0]), words
        assert torch.equal(before[1], after[1]), words


def _effect(adapter: Path, base: Path) -> tuple[dict[str, Any], Any]:
    """ΔW of each module in PEFT, and the logits for a few tokens."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        deltas = {
            name: module.get_delta_weight("default")  # type: ignore[operator]
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        return deltas, model(torch.arange(20)[None]).logits
