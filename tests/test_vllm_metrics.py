"""What a worker publishes, scraped as vLLM's API server scrapes it: with prometheus_client's collector. No engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from lora_probe.adapter import open_adapter
from lora_probe.engines.load_record import LoadRecord
from lora_probe.ledger import OK
from lora_probe.recording import SCHEMA, Load, Process, TraceWriter
from lora_probe.rules.lp5_loading import name_without_home
from lora_probe.rules.stored import expect
from lora_probe_vllm import METRICS, STRICT, TRACE, register
from lora_probe_vllm.metrics import OWN, SHARED, Metrics

pytestmark = pytest.mark.slow
NAME = 'a "quoted" näme'


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[TraceWriter]:
    with TraceWriter(tmp_path / "run.lptrace" / "vllm-rank-0", Process(SCHEMA, "worker", "vllm", 0, 1, {})) as writer:
        yield writer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "metrics").mkdir()
    monkeypatch.setenv(SHARED, str(tmp_path / "metrics"))
    return tmp_path / "metrics"


def loaded(writer: TraceWriter, adapter: Path, number: int = 0, generation: int = 0) -> LoadRecord:
    """A load of which one module was lost at `read`, and the others are in the slot."""
    files = open_adapter(adapter)
    record = LoadRecord(
        writer, Load(number, NAME, str(adapter), "", 1, generation), files, expect(files, None), "float32"
    )
    record.announce({})
    keys = [row.key for row in record.expected]
    lost = name_without_home(keys[0][0], None, "vLLM")
    record.station("read", dict.fromkeys(keys[1:], OK) | {keys[0]: lost})
    record.station("placed", dict.fromkeys(keys[1:], OK))
    return record


def scraped(folder: Path, name: str) -> dict[tuple[str, ...], float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    samples = [sample for family in registry.collect() for sample in family.samples if sample.name == name]
    return {tuple(value for _, value in sorted(sample.labels.items())): sample.value for sample in samples}


def states(folder: Path, generation: str = "0", rank: str = "0", engine: str = "0") -> dict[str, float]:
    """By state; the labels are adapter, engine, generation, rank, state."""
    samples, of = scraped(folder, "lora_probe_modules"), (NAME, engine, generation, rank)
    return {labels[4]: value for labels, value in samples.items() if labels[:4] == of and value}


def test_fates_follow_the_ledger(writer: TraceWriter, folder: Path, adapter: Path) -> None:
    metrics, record = Metrics(rank=0), loaded(writer, adapter)
    metrics.publish([record])
    count = len(record.expected)
    assert states(folder) == {"lost": 1, "unknown": count - 1}
    keys = [row.key for row in record.expected if not record.ended(row.key)]
    record.ran(5, keys, 5)
    record.so_far()
    metrics.publish([record])
    assert states(folder) == {"lost": 1, "took_effect": count - 1}
    record.ran(3, keys, 1)
    record.so_far()
    metrics.publish([record])
    assert states(folder) == {"lost": 1, "wrong": count - 1}


def test_ended_loads_leave_no_series_and_counters_go_on(writer: TraceWriter, folder: Path, adapter: Path) -> None:
    metrics, first = Metrics(rank=0), loaded(writer, adapter)
    keys = [row.key for row in first.expected][1:]
    first.ran(4, keys, 4)
    first.contaminated({"x": 3, "y": 4})
    metrics.publish([first])
    metrics.publish([first])
    assert scraped(folder, "lora_probe_contaminated_rows_total") == {(NAME, "0", "0"): 7}
    second = loaded(writer, adapter, 1, 1)
    second.ran(4, keys, 1)
    second.contaminated({"x": 2})
    second.not_in_its_slot({"z": 3})
    metrics.publish([second])
    assert scraped(folder, "lora_probe_contaminated_rows_total") == {(NAME, "0", "0"): 9}
    assert scraped(folder, "lora_probe_stale_rows_total") == {(NAME, "0", "0"): 3}
    assert {labels[2] for labels in scraped(folder, "lora_probe_modules")} == {"1"}
    metrics.publish([])
    assert scraped(folder, "lora_probe_modules") == {}
    assert scraped(folder, "lora_probe_contaminated_rows_total") == {(NAME, "0", "0"): 9}


def test_engines_of_data_parallelism_have_their_own_series(
    writer: TraceWriter, folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in (0, 1):
        # Each engine is a process of its own.
        monkeypatch.setattr(os, "getpid", lambda number=engine: 1000 + number)
        metrics, record = Metrics(rank=0, engine=engine), loaded(writer, adapter)
        record.contaminated({"x": 3 + engine})
        metrics.publish([record])
    assert scraped(folder, "lora_probe_contaminated_rows_total") == {(NAME, "0", "0"): 3, (NAME, "1", "0"): 4}
    assert states(folder, engine="0") == states(folder, engine="1") != {}


def test_a_folder_that_cannot_be_written(
    writer: TraceWriter, folder: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and the samples are there as soon as it can be written again."""
    metrics, record = Metrics(rank=0), loaded(writer, adapter)
    folder.rmdir()
    metrics.publish([record])
    metrics.publish([record])
    assert len(caplog.records) == 1
    folder.mkdir()
    metrics.publish([record])
    assert states(folder)["lost"] == 1


def test_without_a_trace_there_is_nothing_to_publish(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(TRACE, raising=False)
    monkeypatch.setenv(METRICS, "1")
    monkeypatch.setenv(STRICT, "1")
    register()
    expected = [f"{name}=1 has no effect without {TRACE}" for name in (STRICT, METRICS)]
    assert [record.getMessage() for record in caplog.records] == expected
    assert OWN not in os.environ
