"""Faults in a model that people run, SmolLM2-135M: PEFT against vLLM, 90 modules in float32."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import SharedEngine, record_peft, start_engine
from faults import EVERY, FILES, SLOTS, V1, Expected, damaged_slots, louder_kernel
from test_compare_faults import require
from written import edited, write_adapter

from lora_probe import compare
from lora_probe.recording import Trace

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "identity"))

pytestmark = [pytest.mark.engine, pytest.mark.wide]

PROMPTS = ["Who are you?"]
IN_FILES = (
    "one percent of one B",
    "another sign",
    "A of one module",
    "k and v of one layer",
    "two layers",
    "alpha",
    "rsLoRA",
)
IN_SLOTS = ("a factor in one module", "one percent in one module", "k and v", "other numbers", "an empty slot")


@pytest.fixture(scope="module")
def base() -> Path:
    from base_model import base_model

    return Path(base_model(None))


@pytest.fixture(scope="module")
def healthy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("smol") / "adapter", base, trained=0.02)


@pytest.fixture(scope="module")
def reference(base: Path, healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("smol") / "peft"
    trace: Trace = record_peft(healthy, base, folder, prompts=PROMPTS, max_tokens=3)
    return trace


@pytest.fixture(scope="module")
def serving(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SharedEngine:
    return start_engine(base, tmp_path_factory.mktemp("smol") / "first.lptrace")


def run(serving: SharedEngine, adapter: Path, folder: Path) -> Trace:
    trace: Trace = serving.record(adapter, folder, prompts=PROMPTS, max_tokens=3)
    return trace


def judge(reference: Trace, candidate: Trace, expected: Expected) -> None:
    """In both directions. A fault of all modules is one of all 90."""
    if expected.modules == EVERY:
        everything = frozenset(key[0] for key in reference.rows.modules) if reference.rows is not None else EVERY
        assert len(everything) == 90
        expected = Expected(expected.code, everything, expected.factor)
    require(compare(reference, candidate), expected)
    require(compare(candidate, reference), expected, reverse=True)


def test_healthy_runs_agree(reference: Trace, serving: SharedEngine, healthy: Path, tmp_path: Path) -> None:
    comparison = compare(reference, run(serving, healthy, tmp_path / "run"))
    assert (comparison.verdict, comparison.causes) == ("agree", ())


@pytest.mark.parametrize("name", IN_FILES)
def test_a_checkpoint(name: str, reference: Trace, serving: SharedEngine, healthy: Path, tmp_path: Path) -> None:
    fault = FILES[name]
    folder = edited(healthy, tmp_path / "edited", fault.tensors, fault.config)
    judge(reference, run(serving, folder, tmp_path / "run"), fault.expected)


@pytest.mark.parametrize("name", IN_SLOTS)
def test_a_slot(name: str, reference: Trace, serving: SharedEngine, healthy: Path, tmp_path: Path) -> None:
    with damaged_slots(SLOTS[name]):
        candidate = run(serving, healthy, tmp_path / "run")
    judge(reference, candidate, SLOTS[name].expected)


def test_a_kernel(reference: Trace, serving: SharedEngine, healthy: Path, tmp_path: Path) -> None:
    with louder_kernel(serving.llm, 1.05):
        candidate = run(serving, healthy, tmp_path / "run")
    judge(reference, candidate, Expected("LP604", frozenset({V1})))
