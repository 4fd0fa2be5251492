"""The trace on disk: written, truncated anywhere, read again."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_probe import open_trace
from lora_probe.errors import UnreadableFile
from lora_probe.ledger import OK, Finding, headline
from lora_probe.recording import SCHEMA, Load, ModuleRecord, Placed, Process, RequestRecord, Rows, TraceWriter

KEYS = (("model.layers.0.q_proj", "weight", None), ("model.layers.0.experts", "down_proj", 3))


def rows(count: int = 4, request: str = "a", keys: Any = KEYS, start: int = 0) -> Rows:
    shape = (count, len(keys))
    return Rows(
        modules=keys,
        requests=(request,),
        request=np.zeros(count, np.int32),
        position=np.arange(start, start + count, dtype=np.int32),
        phase=np.zeros(count, np.int8),
        load=np.zeros(count, np.int32),
        x_norm=np.ones(shape, np.float32),
        base_norm=np.ones(shape, np.float32),
        delta_norm=np.full(shape, 2, np.float32),
        output_norm=np.ones(shape, np.float32),
        shrink=np.ones((*shape, 2), np.float32),
        placed={0: Placed(("x",) * len(keys), np.ones((len(keys), 2, 2), np.float32))},
    )


def process(**changes: Any) -> Process:
    settings = {"schema": SCHEMA, "role": "engine", "engine": "peft", "rank": 0, "pid": 1, "versions": {}}
    return Process(**(settings | changes))


def write(folder: Path, **changes: Any) -> None:
    with TraceWriter(folder / "peft", process(**changes)) as writer:
        writer.event("wrap", "Linear -> Linear", module="model.layers.0.q_proj", seconds=0.1, more=[1])
        writer.record(Load(0, "a", "/a", "d"))
        writer.record(ModuleRecord(0, *KEYS[0], ["file"]))
        for station in ("stored", "read", "placed", "applied", "agrees"):
            writer.station(0, station, OK, [KEYS[0]])
        writer.request(RequestRecord("a", 0, "a", [1, 2], [3], "x", [-0.5]))
        writer.rows(rows())
        writer.rows(rows(request="b", start=4))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path)
    trace = open_trace(tmp_path)
    assert trace.complete
    ((load, ledger),) = trace.loads
    assert (load.name, headline(ledger)) == ("a", "1 of 1 modules took effect")
    assert trace.requests[0].output_ids == [3]
    assert trace.events[0].facts == {"more": [1]}
    found = trace.rows
    assert found is not None
    assert found.modules == KEYS
    assert [found.requests[n] for n in found.request] == ["a"] * 4 + ["b"] * 4
    assert found.position.tolist() == list(range(8))
    np.testing.assert_array_equal(found.delta_norm, np.full((8, 2), 2))
    assert found.placed[0].digests == ("x", "x")


def test_an_unclosed_process_is_called_incomplete(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "peft", process())
    writer.record(Load(0, "a", "/a", "d"))
    writer.record(ModuleRecord(0, *KEYS[0], ["file"]))
    writer.station(0, "stored", OK, [KEYS[0]])
    writer.rows(rows())
    path = tmp_path / "peft" / "process.json"
    # This process still runs. One that ended began at another time than the process that has its id now.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"began": "1"}))
    trace = open_trace(tmp_path)
    assert trace.unclosed == ("peft",)
    assert trace.rows is None
    ((_, ledger),) = trace.loads
    assert ledger.count("unknown") == 1
    assert "the recording ended before it was measured" in headline(ledger)


def test_leaving_with_an_error_does_not_close(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TraceWriter(tmp_path / "peft", process()) as writer:
            writer.rows(rows())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    trace = open_trace(tmp_path)
    assert not trace.complete
    assert trace.rows is not None


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 400])
def test_a_file_of_events_may_be_cut_anywhere(tmp_path: Path, keep: int) -> None:
    write(tmp_path)
    path = tmp_path / "peft" / "events.jsonl"
    path.write_bytes(path.read_bytes()[:keep])
    open_trace(tmp_path).loads  # noqa: B018


def test_a_kind_of_record_that_only_a_newer_version_knows_is_skipped(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "peft" / "events.jsonl"
    records = open_trace(tmp_path).processes[0].records
    path.write_bytes(b'{"kind":"weather","at":1,"more":[{}]}\n' + path.read_bytes())
    assert open_trace(tmp_path).processes[0].records == records


@pytest.mark.parametrize("line", [b'{"kind":"load"}', b'{"kind":"no such kind"}', b'{"kind":1}', b"{}", b"1"])
def test_a_record_that_no_version_writes_is_an_error(tmp_path: Path, line: bytes) -> None:
    write(tmp_path)
    path = tmp_path / "peft" / "events.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(UnreadableFile, match=r"events.jsonl`, line 1"):
        open_trace(tmp_path)


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "peft" / "events.jsonl"
    path.write_bytes(b"{]\n" + path.read_bytes())
    with pytest.raises(UnreadableFile, match=r"events.jsonl`, line 1"):
        open_trace(tmp_path)


def test_a_broken_segment_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    segment = tmp_path / "peft" / "000001.safetensors"
    segment.write_bytes(segment.read_bytes()[:100])
    with pytest.raises(UnreadableFile, match=r"000001.safetensors"):
        open_trace(tmp_path).rows  # noqa: B018


def test_a_newer_schema_is_refused_and_new_fields_are_ignored(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "peft" / "process.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"new_field": 1}))
    assert open_trace(tmp_path).complete
    path.write_text(json.dumps(data | {"schema": SCHEMA + 1}))
    with pytest.raises(UnreadableFile, match=f"schema {SCHEMA + 1}"):
        open_trace(tmp_path)


def test_segments_of_other_modules_are_joined(tmp_path: Path) -> None:
    other = (("model.layers.1.q_proj", "weight", None),)
    with TraceWriter(tmp_path / "peft", process()) as writer:
        writer.rows(rows())
        writer.rows(rows(request="b", keys=other))
    found = open_trace(tmp_path).rows
    assert found is not None
    assert found.modules == (*KEYS, *other)
    assert np.isnan(found.delta_norm[:4, 2]).all()
    assert np.isnan(found.delta_norm[4:, :2]).all()


def test_a_segment_closes_by_its_number_of_rows(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "peft", process())
    writer.rows(rows(5000))
    assert (tmp_path / "peft" / "000001.safetensors").exists()
    assert not list((tmp_path / "peft").glob("*.partial"))


def test_a_segment_closes_by_time_though_no_row_comes(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "vllm-rank-0", process(role="worker"))
    writer.rows(rows())
    writer.flush_by_time(lambda stage: nullcontext())
    segment = tmp_path / "vllm-rank-0" / "000001.safetensors"
    started = time.monotonic()
    while not segment.exists():
        assert time.monotonic() < started + 5
        time.sleep(0.02)
    found = open_trace(tmp_path).rows
    assert found is not None
    assert len(found) == 4
    # Segments are counted while the recording runs.
    wait = time.monotonic() + 5
    while open_trace(tmp_path).processes[0].process.segments == 0:
        assert time.monotonic() < wait
    segment.unlink()
    assert open_trace(tmp_path).processes[0].missing == 1
    writer.close()


def test_the_worst_finding_of_all_ranks_counts(tmp_path: Path) -> None:
    for rank, value in enumerate((OK, Finding("wrong", "LP504", "x"))):
        with TraceWriter(tmp_path / f"vllm-rank-{rank}", process(role="worker", engine="vllm", rank=rank)) as writer:
            writer.record(Load(0, "a", "/a", "d"))
            writer.record(ModuleRecord(0, *KEYS[0], ["file"]))
            for station in ("stored", "read", "applied", "agrees"):
                writer.station(0, station, OK, [KEYS[0]])
            writer.station(0, "placed", value, [KEYS[0]])
    ((_, ledger),) = open_trace(tmp_path).loads
    assert ledger.rows[0].stations["placed"].code == "LP504"


def test_not_a_trace(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="does not exist"):
        open_trace(tmp_path / "no")
    with pytest.raises(UnreadableFile, match="is not a trace") as refused:
        open_trace(tmp_path)
    assert "lora-probe trace" in refused.value.hint
    adapter = tmp_path / "an adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UnreadableFile, match="is an adapter, not a trace") as refused:
        open_trace(adapter)
    assert refused.value.hint == f"lora-probe inspect '{adapter}'"


def test_rows_without_shrink(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process()) as writer:
        writer.rows(replace(rows(), shrink=None, placed={}))
    found = open_trace(tmp_path).rows
    assert found is not None
    assert found.shrink is None
