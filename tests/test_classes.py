"""Adapters of every task type of PEFT, on many model classes: PEFT and vLLM load them, and `check` reports nothing.

All of them are made, described and loaded once for all tests (`classes.py`, `vllm_loads.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from classes import BASES, CASES, landed, make_adapter, make_base
from cures import Patient, follow
from safetensors.numpy import load_file, save_file
from written import PREFIX, WEIGHTS

from lora_probe import check
from lora_probe.adapter import open_adapter
from lora_probe.adapter.saved import HEADS_OF_TASKS
from lora_probe.base import EngineView, open_base
from lora_probe.checking import Report
from lora_probe.engines.remembered import keys_of, remember

pytestmark = pytest.mark.slow

NOT_BUILT = {"bloom", "xlm-roberta-features"}
"""vLLM 0.32 has a class for them and cannot build it: the first on the meta device, the second with transformers 5."""
SAVED_TWICE = "base_model.model.classifier.modules_to_save.bias"
"""With `bias: all`, PEFT saves the bias of a trained head a second time, under its name in the live model, and loads
only the first."""


@dataclass
class Corpus:
    """The cases, each with the report of `check`, with and without its base, and what vLLM does with it."""

    folder: Path
    reports: dict[str, Report]
    without_base: dict[str, Report]
    in_vllm: dict[str, Any]

    def adapter(self, name: str) -> Path:
        return self.folder / "adapters" / name

    def base(self, name: str) -> Path:
        return self.folder / "bases" / CASES[name].base


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("classes")
    for base in BASES:
        make_base(folder / "bases" / base, base)
    for name, case in CASES.items():
        make_adapter(folder / "adapters" / name, folder / "bases" / case.base, case)
    answers = _ask_vllm(folder)
    _remember_views(folder, answers)
    corpus = Corpus(folder, {}, {}, {name: answer["load"] for name, answer in answers.items()})
    for name in CASES:
        corpus.reports[name] = check(corpus.adapter(name), model=str(corpus.base(name)))
        nameless = folder / "nameless" / name
        shutil.copytree(corpus.adapter(name), nameless)
        config = json.loads((nameless / "adapter_config.json").read_text())
        (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
        corpus.without_base[name] = check(nameless)
    return corpus


def _ask_vllm(folder: Path) -> dict[str, Any]:
    """What vLLM has for each base, and what it does with each adapter."""
    cases = [
        {"name": name, "adapter": str(folder / "adapters" / name), "base": str(folder / "bases" / case.base)}
        for name, case in CASES.items()
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("vllm_loads.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "cases.json"), str(folder / "answers.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    return answers


def _remember_views(folder: Path, answers: dict[str, Any]) -> None:
    """Put the engines' answers where `check` looks for them, which would start two processes for each."""
    from lora_probe.engines.peft.engine import PeftEngine

    peft = PeftEngine()
    for name, case in CASES.items():
        base, trained = (
            open_base(str(folder / "bases" / case.base)),
            open_adapter(folder / "adapters" / name).config.trained_as,
        )
        keys = keys_of(base, ["peft", "vllm"], trained)
        remember(keys["peft"], _sent(peft.describe(base, trained)))
        view = answers[name]["view"]
        remember(keys["vllm"], view if isinstance(view, str) else msgspec.convert(view, EngineView))


def _sent(view: EngineView) -> EngineView:
    return msgspec.json.decode(msgspec.json.encode(view), type=EngineView)


def test_every_task_of_peft_is_there() -> None:
    from peft import TaskType

    assert {case.task for case in CASES.values()} == {None, *(task.value for task in TaskType)}
    assert len(CASES) >= 60
    assert len({case.model for case in CASES.values()}) >= 25


def test_the_heads_that_peft_adds_for_a_task() -> None:
    from peft import LoraConfig
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODELS
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def prepare_inputs_for_generation(self) -> None:
            raise NotImplementedError

        _prepare_encoder_decoder_kwargs_for_generation = prepare_inputs_for_generation

    for task, cls in MODELS.items():
        config = LoraConfig(task_type=task, target_modules=["layer"])
        cls(Model(), config)
        assert tuple(config.modules_to_save or ()) == HEADS_OF_TASKS.get(task, ()), task


WARNED = {
    "bert-tokens": {"LP319"},
    "qwen2-reward-causal-base": {"LP319"},
    "bert-classifier-bias": {"LP323"},
    "vit-labels": {"LP319"},
}
"""The number of labels must be passed when the base is loaded, and the second copy of a bias has no effect."""


@pytest.mark.parametrize("name", CASES)
def test_a_healthy_adapter_has_no_findings(name: str, corpus: Corpus) -> None:
    for report in (corpus.reports[name], corpus.without_base[name]):
        assert report.clean
        assert {diagnostic.code for diagnostic in report.diagnostics} <= WARNED.get(name, set())
    assert corpus.reports[name].not_run == ()


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_was_predicted(name: str, corpus: Corpus) -> None:
    tensors = landed(corpus.adapter(name), corpus.base(name), CASES[name])
    assert [tensor for tensor, loaded in tensors.items() if not loaded and tensor != SAVED_TWICE] == []
    ledger = corpus.reports[name].ledgers["peft"]
    assert ledger.healthy
    pairs = {
        tensor.partition(".lora_")[0].removeprefix("base_model.model.") for tensor in tensors if ".lora_" in tensor
    }
    assert {row.module for row in ledger.rows} == pairs


@pytest.mark.parametrize("name", CASES)
def test_vllm_loads_what_was_predicted(name: str, corpus: Corpus) -> None:
    ledger, loaded = corpus.reports[name].ledgers.get("vllm"), corpus.in_vllm[name]
    if "not_built" in loaded:
        assert ledger is None or name in NOT_BUILT, loaded
        return
    if ledger is None:
        assert corpus.reports[name].not_served["vllm"]
        return
    assert (loaded["refused"], ledger.refused) == (None, False)
    assert ledger.healthy
    filled = {part for layer, parts in loaded["modules"].items() for part in (layer, *(f"{layer}[{n}]" for n in parts))}
    assert {row.engine_as for row in ledger.rows} <= filled
    assert sum(map(len, loaded["modules"].values())) == len(ledger.rows)


SERVED = (
    ("t5", "vLLM does not serve T5ForConditionalGeneration: it has no class for it"),
    ("distilbert-classifier", "vLLM does not serve DistilBertForMaskedLM: it has no class for it"),
    ("gpt2", "vLLM serves this base model without adapters (GPT2LMHeadModel does not support LoRA yet.)"),
    (
        "llama-classifier-causal-base",
        "vLLM serves this base model as LlamaForCausalLM, not as the LlamaForSequenceClassification of the adapter",
    ),
)


@pytest.mark.parametrize(("name", "why"), SERVED)
def test_what_vllm_does_not_serve_is_judged_if_it_is_asked_for(name: str, why: str, corpus: Corpus) -> None:
    default = corpus.reports[name]
    assert default.not_served["vllm"].startswith(why)
    assert list(default.ledgers) == ["peft"]
    asked = check(corpus.adapter(name), model=str(corpus.base(name)), engines=["peft", "vllm"])
    assert list(asked.ledgers) == ["peft", "vllm"]
    assert asked.ledgers["vllm"].refused
    assert {diagnostic.engines for diagnostic in asked.diagnostics} == {("vllm",)}
    assert check(corpus.adapter(name), model=str(corpus.base(name)), engines=["peft"]).diagnostics == ()


# The same adapters, damaged: the cause is named, its advice is followed, and PEFT loads everything again.

Damage = Callable[[Path], None]


def renamed(new: Callable[[str], str]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({new(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})

    return damage


def configured(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | change(config), indent=2))

    return damage


def damages(adapter: Path) -> dict[str, tuple[set[str], Damage]]:
    """What can go wrong with this adapter -> the codes of rules that may name it, and the damage."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    names = list(load_file(adapter / WEIGHTS))
    pairs = [name.partition(".lora_")[0].removeprefix(PREFIX) for name in names if ".lora_" in name]
    heads = {name.rpartition(".")[0] for name in names if ".lora_" not in name and name != SAVED_TWICE}
    possible = {
        "no prefix": ({"LP215", "LP322"}, renamed(lambda name: name.removeprefix(PREFIX))),
        "prefix twice": ({"LP214", "LP322"}, renamed(lambda name: PREFIX + name)),
        "compiled": ({"LP213", "LP322"}, renamed(lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."))),
        "another rank": ({"LP201"}, configured(lambda raw: {"r": 2 * raw["r"]})),
    }
    targets = config["target_modules"]
    if isinstance(targets, list) and len(targets) > 1:
        left = min(targets)
        rest = [name for name in targets if name != left]
        possible["target left out"] = {"LP106"}, configured(lambda _: {"target_modules": rest})
        possible["target excluded"] = {"LP106"}, configured(lambda _: {"exclude_modules": [left]})
    for word in ("layers", "layer", "h", "block"):
        if all(f".{word}." in f".{pair}" for pair in pairs):
            other = renamed(lambda name, word=word: name.replace(f".{word}.", ".parts.") if ".lora_" in name else name)
            possible["another word"] = {"LP302", "LP325"}, other
            break
    if heads and config["task_type"] in HEADS_OF_TASKS:
        live = {f"{head}.": f"{head}.modules_to_save.default." for head in heads}
        possible["head under its live name"] = {"LP322"}, renamed(lambda name: _replaced(name, live))
    return possible


def _replaced(name: str, beginnings: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in beginnings.items() if name.startswith(old)), name)


@pytest.mark.parametrize("name", CASES)
def test_damages_are_named_and_cured(name: str, corpus: Corpus, tmp_path: Path) -> None:
    possible = damages(corpus.adapter(name))
    assert len(possible) >= 4
    # Every second one: each damage is done to half of the adapters, and each adapter has at least two.
    for number, (kind, (codes, damage)) in list(enumerate(possible.items()))[list(CASES).index(name) % 2 :: 2]:
        damaged = shutil.copytree(corpus.adapter(name), tmp_path / str(number))
        damage(damaged)
        report = check(damaged, model=str(corpus.base(name)))
        if kind == "no prefix" and report.clean:
            # For some classes PEFT adds the prefix itself.
            assert all_landed(damaged, name, corpus)
            continue
        (diagnostic,) = [found for found in report.diagnostics if found.severity == "error"]
        assert diagnostic.code in codes, (kind, diagnostic)
        assert_cured(Patient(damaged, corpus.adapter(name), corpus.base(name), diagnostic), name, corpus)


def assert_cured(patient: Patient, name: str, corpus: Corpus) -> None:
    """Every alternative of the hint leads to an adapter without findings, with the scalings of the healthy one, that
    PEFT loads as a whole."""
    scalings = {module.key: module.scaling for module in open_adapter(patient.healthy).modules}
    for words, cured in follow(patient):
        report = check(cured.folder, model=str(patient.base))
        assert report.clean, (words, report.diagnostics)
        assert all(ledger.healthy for ledger in report.ledgers.values()), words
        assert {module.key: module.scaling for module in open_adapter(cured.folder).modules} == scalings
        assert all_landed(cured.folder, name, corpus), words


def all_landed(adapter: Path, name: str, corpus: Corpus) -> bool:
    """Whether PEFT loads every tensor of the adapter, under its own name or the one that it makes of it."""
    tensors = landed(adapter, corpus.base(name), CASES[name])
    return all(loaded for tensor, loaded in tensors.items() if tensor != SAVED_TWICE)
