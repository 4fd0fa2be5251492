"""The predicted ledger is true: every adapter that goes wrong is loaded in real PEFT and in real vLLM, and they do
what `check` predicted, module by module, refusals included."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import SharedEngine, record_peft, save_adapter
from failures import FAILURES, HEALTHY, Save, as_bin
from written import DATA, in_dtype, write_adapter

from lora_probe import check
from lora_probe.adapter import open_adapter
from lora_probe.checking import Report
from lora_probe.ledger import Ledger, Row
from lora_probe.names import Key

OUTCOMES = DATA / "outcomes.json"
"""The ledgers that failures come to: `python tests/record_outcomes.py`."""
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


@dataclass
class Corpus:
    """The adapters that go wrong and those that do not, each made once, and checked once for all tests of it."""

    folder: Path
    healthy: Path
    base: Path
    save: Save
    reports: dict[str, Report] = field(default_factory=dict)

    def adapter(self, name: str) -> Path:
        target = self.folder / name
        if not target.exists():
            self._make(name, target)
        return target

    def _make(self, name: str, target: Path) -> None:
        if name in FAILURES:
            FAILURES[name].make(self.healthy, self.base, target, self.save)
        elif name in IN_DTYPE:
            in_dtype(self.adapter(IN_DTYPE[name]), target, name)
        else:
            self.save(target, self.base, **HEALTHY[name])

    def report(self, name: str) -> Report:
        if name not in self.reports:
            self.reports[name] = check(self.adapter(name), model=str(self.base), options=LIMIT)
        return self.reports[name]


IN_DTYPE = {"bfloat16": "q-k-v", "float16": "all-linear", "float8_e4m3fn": "q-k-v", "float8_e5m2": "q-k-v"}


@pytest.fixture(scope="session")
def written(adapter: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Written as PEFT saves them."""
    return Corpus(tmp_path_factory.mktemp("written"), adapter, llama, write_adapter)


@pytest.fixture(scope="session")
def saved(adapter: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Saved by PEFT, and one of them as a pickle."""
    corpus = Corpus(tmp_path_factory.mktemp("saved"), adapter, llama, save_adapter)
    as_bin(corpus.adapter("q-k-v"), corpus.folder / "bin")
    return corpus


def summary(ledger: Ledger) -> dict[str, Any]:
    """A predicted ledger without its sentences: what is told of modules, and of which: "all", or their names."""
    groups: dict[str, list[str]] = {}
    for row in ledger.rows:
        shown = [f"{name} {finding.value} {finding.code}".rstrip() for name, finding in row.stations.items()]
        groups.setdefault(f"{row.fate}: {', '.join(shown)}; expected by {', '.join(row.expected_by)}", []).append(
            f"{row.module} as {row.engine_as} from {row.stored_as}"
        )
    told: dict[str, Any] = {key: names if len(groups) > 1 else "all" for key, names in groups.items()}
    return {"refused": ledger.code} | told if ledger.refused else told


def assert_recorded(report: Report, name: str, engine: str) -> None:
    assert summary(report.ledgers[engine]) == json.loads(OUTCOMES.read_text())[name][engine]


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_named(name: str, written: Corpus) -> None:
    """And comes to the ledgers of the real engines: the tests below hold the same ones against what these do."""
    report = written.report(name)
    assert errors(report) == set(FAILURES[name].codes), [one.message for one in report.diagnostics]
    for engine in ("peft", "vllm"):
        assert_recorded(report, name, engine)


@pytest.mark.parametrize("name", [name for name, one in FAILURES.items() if one.trained])
def test_a_failure_that_peft_saved_is_named(name: str, saved: Corpus) -> None:
    report = saved.report(name)
    assert errors(report) == set(FAILURES[name].codes), [one.message for one in report.diagnostics]


@pytest.mark.parametrize("name", FAILURES)
def test_peft_does_what_was_predicted(name: str, saved: Corpus, tmp_path: Path) -> None:
    trace = record_peft(saved.adapter(name), saved.base, tmp_path / "peft.lptrace", prompts=("Hi",), max_tokens=1)
    assert_predicted(saved.report(name).ledgers["peft"], trace)
    assert_recorded(saved.report(name), name, "peft")


@pytest.mark.engine
@pytest.mark.parametrize("name", FAILURES)
def test_vllm_does_what_was_predicted(name: str, saved: Corpus, engine: SharedEngine, tmp_path: Path) -> None:
    trace = engine.record(saved.adapter(name), tmp_path / "vllm.lptrace", prompts=("Hi",), max_tokens=1)
    assert_predicted(saved.report(name).ledgers["vllm"], trace)
    assert_recorded(saved.report(name), name, "vllm")


def assert_no_rule_speaks(report: Report) -> None:
    assert report.diagnostics == ()
    assert report.not_run == ()
    assert all(ledger.healthy for ledger in report.ledgers.values())


@pytest.mark.parametrize("name", [*HEALTHY, *IN_DTYPE])
def test_no_rule_speaks_of_a_healthy_adapter(name: str, written: Corpus) -> None:
    assert_no_rule_speaks(written.report(name))


@pytest.mark.engine
@pytest.mark.parametrize("name", [*HEALTHY, "bin", *IN_DTYPE])
def test_a_healthy_adapter_takes_effect(name: str, saved: Corpus, engine: SharedEngine, tmp_path: Path) -> None:
    report, folder = saved.report(name), saved.adapter(name)
    assert_no_rule_speaks(report)
    peft = record_peft(folder, saved.base, tmp_path / "p", prompts=("Hi",), max_tokens=1)
    assert_predicted(report.ledgers["peft"], peft)
    vllm = engine.record(folder, tmp_path / "v", prompts=("Hi",), max_tokens=1)
    assert_predicted(report.ledgers["vllm"], vllm)


@pytest.mark.parametrize("name", [*HEALTHY, *IN_DTYPE])
def test_no_rule_speaks_without_a_base(name: str, written: Corpus) -> None:
    assert check(written.adapter(name)).diagnostics == ()


@pytest.mark.slow
def test_no_rule_speaks_of_what_peft_saved_without_a_base(saved: Corpus) -> None:
    for name in (*HEALTHY, "bin", *IN_DTYPE):
        assert check(saved.adapter(name)).diagnostics == (), name


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HEALTHY, *(name for name, one in FAILURES.items() if one.trained)])
def test_what_is_written_is_what_peft_saves(name: str, written: Corpus, saved: Corpus) -> None:
    """Without this, the fast tests would be about adapters that nobody has."""
    mine, pefts = open_adapter(written.adapter(name)), open_adapter(saved.adapter(name))
    headers = [
        {tensor.name: (tensor.dtype, tensor.shape) for tensor in one.weights.tensors.values()} for one in (mine, pefts)
    ]
    assert headers[0] == headers[1]
    configs = [
        {key: sorted(value) if isinstance(value, list) else value for key, value in one.config.raw.items()}
        for one in (mine, pefts)
    ]
    assert configs[0] == configs[1]
