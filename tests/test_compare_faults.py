"""Faults in real engines, each injected in its own way: `compare` names the cause, in either direction."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SharedEngine, record_peft
from faults import (
    EVERY,
    FILES,
    SLOTS,
    V1,
    Expected,
    SlotFault,
    damaged_slots,
    louder_kernel,
    of_another,
    rows_without_a_slot,
    scaling_squared,
    weights_of,
)
from written import edited, write_adapter

from lora_probe import compare
from lora_probe.comparison import Comparison
from lora_probe.recording import NamedAdapter, Trace

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def in_peft(adapter: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The healthy adapter, as it should be."""
    trace: Trace = record_peft(adapter, llama, tmp_path_factory.mktemp("healthy") / "peft")
    return trace


def require(comparison: Comparison, expected: Expected, reverse: bool = False) -> None:
    """The first cause is the one that was injected."""
    assert comparison.verdict == "differ"
    assert comparison.causes, comparison.notes
    cause = comparison.causes[0]
    assert cause.code == expected.code, [(c.code, c.message) for c in comparison.causes]
    if expected.modules is not None:
        assert {key[0] for key in cause.modules} == expected.modules
    if expected.factor is None:
        assert cause.factor is None
    else:
        assert cause.factor == pytest.approx(1 / expected.factor if reverse else expected.factor, rel=2e-3)


@pytest.mark.parametrize("name", FILES)
def test_an_edited_checkpoint(name: str, in_peft: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    fault = FILES[name]
    folder = edited(adapter, tmp_path / "edited", fault.tensors, fault.config)
    candidate = engine.record(folder, tmp_path / "run")
    require(compare(in_peft, candidate), fault.expected)
    require(compare(candidate, in_peft), fault.expected, reverse=True)


@pytest.mark.parametrize("name", SLOTS)
def test_a_damaged_slot(name: str, in_peft: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    fault = SLOTS[name]
    with damaged_slots(fault):
        candidate = engine.record(adapter, tmp_path / "run")
    require(compare(in_peft, candidate), fault.expected)
    require(compare(candidate, in_peft), fault.expected, reverse=True)


def test_the_weights_of_another_adapter(
    in_peft: Trace, engine: SharedEngine, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    """They are known if one of the traces has them."""
    folder = write_adapter(tmp_path / "other", llama, seed=9)
    beside = [NamedAdapter("other", str(folder))]
    both = record_peft(adapter, llama, tmp_path / "both", beside=beside)
    fault = SlotFault(Expected("LP624", EVERY), of_another(weights_of(folder)))
    with damaged_slots(fault):
        candidate = engine.record(adapter, tmp_path / "run")
    for traces in ((both, candidate), (candidate, both)):
        comparison = compare(*traces, adapter=adapter.name)
        require(comparison, fault.expected)
        assert "with the weights of adapter `other`" in comparison.causes[0].message


def test_the_scaling_twice_in_the_loader(in_peft: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    with scaling_squared():
        candidate = engine.record(adapter, tmp_path / "run")
    comparison = compare(in_peft, candidate)
    require(comparison, Expected("LP621", EVERY, 2.0))
    assert "the scaling 2 was applied twice" in comparison.causes[0].message
    assert comparison.causes[0].side == "candidate"


def test_a_kernel_that_writes_too_much(in_peft: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    with louder_kernel(engine.llm, 1.05):
        candidate = engine.record(adapter, tmp_path / "run")
    for traces in ((in_peft, candidate), (candidate, in_peft)):
        require(compare(*traces), Expected("LP604", frozenset({V1})))


@pytest.mark.parametrize("every", [1, 2])
def test_rows_that_run_without_the_adapter(
    every: int, in_peft: Trace, engine: SharedEngine, adapter: Path, tmp_path: Path
) -> None:
    with rows_without_a_slot(every):
        candidate = engine.record(adapter, tmp_path / "run")
    for traces in ((in_peft, candidate), (candidate, in_peft)):
        comparison = compare(*traces)
        require(comparison, Expected("LP606"))
        parts = [diff.parts for diff in comparison.modules if diff.parts is not None]
        assert parts
        assert all(part.routing > 0.1 for part in parts)


def test_a_refusal(in_peft: Trace, engine: SharedEngine, llama: Path, tmp_path: Path) -> None:
    wide = write_adapter(tmp_path / "wide", llama, r=32)
    candidate = engine.record(wide, tmp_path / "run")
    require(compare(in_peft, candidate), Expected("LP401"))
    require(compare(candidate, in_peft), Expected("LP401"))
