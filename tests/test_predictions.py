"""The predicted ledger is true: every adapter that goes wrong is loaded in real PEFT and in real vLLM, and what they do
is what `check` had said, module by module, refusals included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import SharedEngine, record_peft, save_adapter
from failures import FAILURES, HEALTHY, as_bin, in_dtype

from lora_probe import check
from lora_probe.checking import Report
from lora_probe.ledger import Ledger, Row
from lora_probe.names import Key

LIMIT = {"max_lora_rank": 16}
"""The options of the shared engine."""


def outcome(row: Row) -> str:
    """The fate of a module as far as files decide it: if a run measured nothing later, `placed` is the last station."""
    if row.fate != "unknown":
        return row.fate
    return {"ok": "took effect", "unknown": "unknown"}.get(row.stations["placed"].value, "lost")


def outcomes(ledger: Ledger) -> dict[Key, str]:
    return {row.key: outcome(row) for row in ledger.rows}


def assert_predicted(predicted: Ledger, trace: Any) -> None:
    said = [event.text for event in trace.events if event.stage == "refused"]
    loads = trace.loads
    refused = bool(said) or any(load.refused for load, _ in loads)
    assert predicted.refused == refused, (predicted.message, predicted.code, said)
    if refused:
        return
    measured = outcomes(loads[0][1])
    expected = outcomes(predicted)
    differing = {
        key: (expected.get(key), measured.get(key))
        for key in measured.keys() | expected.keys()
        if measured.get(key) != expected.get(key) and measured.get(key) != "unknown"
    }
    assert not differing


def errors(report: Report) -> set[str]:
    return {one.code for one in report.diagnostics if one.severity == "error"}


@pytest.fixture(scope="session")
def failing(adapter: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("failures")
    return {name: one.make(adapter, llama, folder / name) for name, one in FAILURES.items()}


@pytest.fixture(scope="session")
def healthy(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("healthy")
    made = {name: save_adapter(folder / name, llama, **settings) for name, settings in HEALTHY.items()}
    made["bin"] = as_bin(made["q-k-v"], folder / "bin")
    made["bfloat16"] = in_dtype(made["q-k-v"], folder / "bfloat16", "bfloat16")
    made["float16"] = in_dtype(made["all-linear"], folder / "float16", "float16")
    return made


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_named(name: str, failing: dict[str, Path], llama: Path) -> None:
    report = check(failing[name], model=str(llama), options=LIMIT)
    assert errors(report) == set(FAILURES[name].codes), [one.message for one in report.diagnostics]


@pytest.mark.parametrize("name", FAILURES)
def test_peft_does_what_was_predicted(name: str, failing: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    report = check(failing[name], model=str(llama), options=LIMIT)
    trace = record_peft(failing[name], llama, tmp_path / "peft.lptrace", prompts=("Hi",), max_tokens=1)
    assert_predicted(report.ledgers["peft"], trace)


@pytest.mark.engine
@pytest.mark.parametrize("name", FAILURES)
def test_vllm_does_what_was_predicted(
    name: str, failing: dict[str, Path], engine: SharedEngine, llama: Path, tmp_path: Path
) -> None:
    report = check(failing[name], model=str(llama), options=LIMIT)
    trace = engine.record(failing[name], tmp_path / "vllm.lptrace", prompts=("Hi",), max_tokens=1)
    assert_predicted(report.ledgers["vllm"], trace)


@pytest.mark.engine
@pytest.mark.parametrize("name", [*HEALTHY, "bin", "bfloat16", "float16"])
def test_no_rule_speaks_of_a_healthy_adapter(
    name: str, healthy: dict[str, Path], engine: SharedEngine, llama: Path, tmp_path: Path
) -> None:
    report = check(healthy[name], model=str(llama), options=LIMIT)
    assert report.diagnostics == ()
    assert report.not_run == ()
    assert all(ledger.healthy for ledger in report.ledgers.values())
    assert_predicted(
        report.ledgers["peft"], record_peft(healthy[name], llama, tmp_path / "p", prompts=("Hi",), max_tokens=1)
    )
    assert_predicted(
        report.ledgers["vllm"], engine.record(healthy[name], tmp_path / "v", prompts=("Hi",), max_tokens=1)
    )


def test_no_rule_speaks_without_a_base(healthy: dict[str, Path], tmp_path: Path) -> None:
    for name, folder in healthy.items():
        report = check(folder)
        assert report.diagnostics == (), name
