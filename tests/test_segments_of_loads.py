"""One segment for each load, a ring of them, and a bounded timeline: what is left out, and what is never left out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_trace_format import process

from lora_probe import open_trace
from lora_probe.errors import UnreadableFile
from lora_probe.ledger import OK
from lora_probe.names import Key
from lora_probe.recording import Floats, Load, LoadEvent, ModuleRecord, Placed, Rows, TraceWriter
from lora_probe.recording import writer as writing
from lora_probe.recording.parts import Parts
from lora_probe.recording.pending import Pending
from lora_probe.recording.rows import output_rows
from lora_probe.recording.segments import Segment, open_segment
from lora_probe.recording.sketch import SKETCH

Q, K, UP = ((f"model.layers.0.{name}", "weight", None) for name in ("q_proj", "k_proj", "up_proj"))
KEYS: tuple[Key, ...] = (Q, K, UP)
MODULES: Mapping[int, dict[Key, int]] = {0: {Q: 4, K: 2}, 1: {UP: 2, K: 1}}
"""The modules of two loads, and the rank of each."""
WIDEST = 8
"""The rank of the engine's buffers."""
BASE, CONTAMINATED = -1, -2


def announce(writer: TraceWriter, load: int, modules: Mapping[Key, int], name: str = "") -> None:
    writer.record(Load(load, name or f"adapter-{load}", "/a", f"digest-{load}", modules=len(modules)))
    for key, rank in modules.items():
        writer.record(ModuleRecord(load, *key, ["file"], stored_as=key[0], rank=rank))


def placed(load: int, version: int = 0) -> Placed:
    """The weights of a load in buffers of the widest rank."""
    gram = np.zeros((len(KEYS), WIDEST, WIDEST), np.float32)
    for key, rank in MODULES[load % 2].items():
        gram[KEYS.index(key), :rank, :rank] = (1 + load) * np.eye(rank)
    has = MODULES[load % 2]
    return Placed(tuple(f"{load}.{version}" if key in has else "" for key in KEYS), gram)


PLACED = {0: placed(0), 1: placed(1)}


def step(loads: list[int], request: str = "r", start: int = 0, known: Mapping[int, Placed] = PLACED) -> Rows:
    """A step of an engine: every row has the columns of all active loads, at the widest rank."""
    count, numbers = len(loads), np.random.default_rng(start)
    shrink = np.zeros((count, len(KEYS), WIDEST), np.float32)
    for row, load in enumerate(loads):
        for key, rank in MODULES[load % 2].items() if load >= 0 else ():
            shrink[row, KEYS.index(key), :rank] = numbers.normal(size=rank)
    delta = np.linalg.norm(shrink, axis=-1)
    for row, load in enumerate(loads):
        if load == CONTAMINATED:
            delta[row] = 0, 0.5, 0
    ones = np.ones((count, len(KEYS)), np.float32)
    return Rows(
        modules=KEYS,
        requests=tuple(f"{request}{number}" for number in range(count)),
        request=np.arange(count, dtype=np.int32),
        position=np.full(count, start, np.int32),
        phase=np.zeros(count, np.int8),
        load=np.maximum(loads, -1).astype(np.int32),
        x_norm=ones,
        base_norm=2 * ones,
        delta_norm=delta,
        output_norm=3 * ones,
        shrink=shrink,
        placed={load: known[load] for load in set(loads) if load >= 0},
    )


def segments(folder: Path) -> list[Segment]:
    return [open_segment(path) for path in sorted((folder / "peft").glob("0*.safetensors"))]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three steps with rows of both loads and of none."""
    with TraceWriter(tmp_path / "peft", process()) as writer:
        for load, modules in MODULES.items():
            announce(writer, load, modules)
        for start, loads in enumerate([[0, 1, BASE], [0, BASE, BASE, 1, 0], [BASE, CONTAMINATED]]):
            writer.rows(step(loads, start=start))
    return tmp_path


def test_each_load_has_its_own_modules_at_its_own_rank(mixed: Path) -> None:
    shapes = {s.loads: (s.modules, s.columns["shrink"].shape, s.grams.shape) for s in segments(mixed) if s.grams}
    assert shapes == {(0,): ((Q, K), (3, 2, 4), (1, 2, 4, 4)), (1,): ((K, UP), (2, 2, 2), (1, 2, 2, 2))}


def test_rows_without_a_load_have_columns_only_if_they_have_a_contribution(mixed: Path) -> None:
    bare, contaminated = sorted((s for s in segments(mixed) if not s.loads), key=lambda s: len(s.modules))
    assert (bare.modules, bare.count) == ((), 4)
    assert (contaminated.modules, contaminated.count) == (KEYS, 1)
    rows = open_trace(mixed).rows_of(-1)
    assert rows is not None
    assert sorted(rows.requests) == ["r0", "r1", "r2"]
    assert len(rows) == 5
    assert np.nansum(rows.delta_norm) == 0.5


def test_all_rows_are_what_they_were(mixed: Path) -> None:
    rows = open_trace(mixed).rows
    assert rows is not None
    assert rows.shrink is not None
    assert len(rows) == 10
    for start, loads in enumerate([[0, 1, BASE], [0, BASE, BASE, 1, 0], [BASE, CONTAMINATED]]):
        before = step(loads, start=start)
        assert before.shrink is not None
        for number, load in enumerate(loads):
            names = [rows.requests[request] for request in rows.request]
            (row,) = [n for n, name in enumerate(names) if name == f"r{number}" and rows.position[n] == start]
            assert rows.load[row] == max(load, -1)
            for key in MODULES.get(load, {}):
                at, now = KEYS.index(key), rows.modules.index(key)
                assert rows.delta_norm[row, now] == before.delta_norm[number, at]
                width = rows.shrink.shape[-1]
                np.testing.assert_array_equal(rows.shrink[row, now], before.shrink[number, at, :width])


def test_rows_of_a_load_read_no_other_segment(mixed: Path) -> None:
    one = open_trace(mixed).rows_of(1)
    assert one is not None
    assert one.shrink is not None
    assert (one.modules, len(one), one.shrink.shape[-1], list(one.placed)) == ((K, UP), 2, 2, [1])
    trace = open_trace(mixed)
    opened = {segment.loads: segment.path for segment in segments(mixed)}
    zero = trace.rows_of(0)
    assert zero is not None
    for loads, path in opened.items():
        if loads != (0,):
            # Nothing of the others is there to be read.
            path.write_bytes(path.read_bytes()[:-8])
    assert len(trace.rows_of(0) or ()) == len(zero) == sum(map(len, trace.segments_of(0))) == 3
    with pytest.raises(UnreadableFile):
        trace.rows  # noqa: B018


def test_nothing_beyond_an_adapters_rank_is_cut_unless_it_is_zero(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process()) as writer:
        announce(writer, 0, MODULES[0])
        rows = step([0])
        assert rows.shrink is not None
        rows.shrink[0, 0, WIDEST - 1] = 9
        writer.rows(rows)
    found = open_trace(tmp_path).rows
    assert found is not None
    assert found.shrink is not None
    assert found.shrink[0, 0, WIDEST - 1] == 9


def test_a_module_that_no_record_names_keeps_its_column(tmp_path: Path) -> None:
    """A load whose modules are not known keeps all columns, and a known one those that belong to no other."""
    with TraceWriter(tmp_path / "peft", process()) as writer:
        writer.rows(step([0]))
        announce(writer, 1, {UP: 2})
        writer.rows(step([1], start=1))
    assert [segment.modules for segment in segments(tmp_path)] == [KEYS, KEYS]


def test_outputs_of_a_model_without_lora_keep_their_columns(tmp_path: Path) -> None:
    norm = np.ones((3, len(KEYS)), np.float32)
    made = output_rows(KEYS, "r", [0, 0, 1], norm, np.ones((3, len(KEYS), SKETCH), np.float32))
    with TraceWriter(tmp_path / "peft", process()) as writer:
        writer.rows(made)
        writer.rows(replace(made, sketch=None))
    rows = open_trace(tmp_path).rows
    assert rows is not None
    assert rows.modules == KEYS
    assert (rows.output_norm == 1).all()
    assert rows.sketch is not None
    assert np.isnan(rows.sketch).any(axis=(1, 2)).tolist() == [False] * 3 + [True] * 3


def test_g_is_written_once_and_again_when_it_changes(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process()) as writer:
        announce(writer, 0, MODULES[0])
        for start, version in enumerate((0, 0, 0, 1, 1)):
            writer.rows(step([0], start=start, known={0: placed(0, version)}))
            writer.flush()
    assert [segment.grams is not None for segment in segments(tmp_path)] == [True, False, False, True, False]
    with TraceWriter(tmp_path / "one" / "peft", process()) as writer:
        for load, modules in MODULES.items():
            announce(writer, load, modules)
        for start in range(3):
            writer.rows(step([0], start=start))
            writer.flush()
    rows = open_trace(tmp_path / "one").rows
    assert rows is not None
    assert rows.placed[0].gram is not None
    assert (rows.placed[0].gram[0] == np.eye(4)).all()


def test_a_level_that_is_raised_while_it_runs(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process()) as writer:
        announce(writer, 0, MODULES[0])
        without = {0: Placed(PLACED[0].digests)}
        writer.rows(replace(step([0], known=without), shrink=None))
        writer.rows(step([0], start=1))
        writer.rows(step([0], start=2))
    assert [segment.grams is not None for segment in segments(tmp_path)] == [False, True]
    rows = open_trace(tmp_path).rows
    assert rows is not None
    assert rows.shrink is not None
    assert rows.placed[0].gram is not None
    assert np.isnan(rows.shrink).all(axis=(1, 2)).tolist() == [True, False, False]


@pytest.mark.slow
def test_a_slow_engine_is_not_idle_between_its_steps() -> None:
    """Or each of its steps would be a segment."""
    pending, parts = Pending(), Parts()

    def add(start: int) -> None:
        for part in parts.of(step([0], start=start)):
            pending.add(part)

    add(0)
    time.sleep(0.2)
    assert pending.idle
    pending.taken()
    add(1)
    time.sleep(0.1)
    assert not pending.idle
    time.sleep(0.8)
    assert pending.idle
    assert not pending.due(3.0)


# Bounds.

BOUND = 2_000_000


def recorded(folder: Path, steps: int, loads: int = 2) -> TraceWriter:
    """Steps that take much more than the bound."""
    writer = TraceWriter(folder / "peft", process(), max_bytes=BOUND)
    for load in range(loads):
        announce(writer, load, MODULES[load % 2])
    known = {load: placed(load) for load in range(loads)}
    for start in range(steps):
        writer.rows(step([start % loads, BASE], start=start, known=known))
        writer.flush()
    return writer


def sizes(folder: Path) -> int:
    """As the ring counts them: a small file as 32 KiB."""
    return sum(max(path.stat().st_size, 2**15) for path in (folder / "peft").glob("0*.safetensors"))


def test_segments_beyond_the_bound_are_removed_and_counted(tmp_path: Path) -> None:
    writer = recorded(tmp_path, 200)
    assert BOUND - 2**15 < sizes(tmp_path) <= BOUND
    trace = open_trace(tmp_path)
    (worker,) = trace.processes
    there = len(list((tmp_path / "peft").glob("0*.safetensors")))
    assert worker.process.segments == 400
    assert trace.dropped.segments == 400 - there
    assert trace.dropped.rows == 400 - there
    assert worker.missing == 0
    writer.close()
    assert open_trace(tmp_path).complete
    (tmp_path / "peft" / "000400.safetensors").unlink()
    assert open_trace(tmp_path).processes[0].missing == 1
    # The first segment of each load is still there, and with it G of every later row.
    rows = open_trace(tmp_path).rows
    assert rows is not None
    first = {load: rows.position[rows.load == load].min() for load in (0, 1)}
    assert first == {0: 0, 1: 1}
    for load in (0, 1):
        assert rows.placed[load].gram is not None
        assert (rows.load == load).sum() > 10


def test_segments_that_are_removed_while_they_are_read(tmp_path: Path) -> None:
    writer = recorded(tmp_path, 60)
    trace = open_trace(tmp_path)
    opened = list(trace.processes[0].opened_segments())
    assert trace.rows_of(0) is not None
    for start in range(60, 90):
        writer.rows(step([0], start=start))
        writer.flush()
    assert not opened[10].path.exists()
    rows = trace.rows
    assert rows is not None
    assert 0 < len(rows) < len(opened)
    writer.close()
    # Of a recording that has ended nothing may be missing.
    ended = open_trace(tmp_path)
    list(ended.processes[0].opened_segments())
    assert ended.rows_of(0) is not None
    (tmp_path / "peft" / "000150.safetensors").unlink()
    with pytest.raises(UnreadableFile):
        ended.rows  # noqa: B018


def test_many_loads_do_not_exceed_the_bound(tmp_path: Path) -> None:
    recorded(tmp_path, 300, loads=150).close()
    assert sizes(tmp_path) <= BOUND
    trace = open_trace(tmp_path)
    assert len(trace.loads) == 150
    assert trace.complete
    rows = trace.rows
    assert rows is not None
    # Those that were there last have their G.
    newest = int(rows.load.max())
    assert newest == 149
    assert rows.placed[newest].gram is not None
    assert not np.isnan(rows.placed[newest].gram[list(rows.modules).index(UP)]).any()


def test_without_a_bound_nothing_is_removed(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process()) as writer:
        for start in range(100):
            writer.rows(step([0, 1, BASE], start=start))
            writer.flush()
    trace = open_trace(tmp_path)
    assert trace.rows is not None
    assert len(trace.rows) == 300
    assert trace.dropped.segments == 0


def load_again(writer: TraceWriter, number: int, name: str, modules: int = 40) -> None:
    """What a worker records about a load, as in `patching_loads.py`."""
    announce(writer, number, MODULES[0], name)
    for stage in ("fold", "set"):
        for module in range(modules):
            writer.event(stage, "done", module=f"model.layers.{module}.q_proj", seconds=0.25)
    writer.record(Load(number, name, "/a", "d", slot=0))
    writer.event("activate", f"{name} is in slot 0")


def test_steps_on_modules_are_listed_for_the_first_load_of_a_name(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process(), max_bytes=BOUND) as writer:
        for number, name in enumerate(["a", "a", "b", "a"]):
            load_again(writer, number, name)
    trace = open_trace(tmp_path)
    assert len(trace.loads) == 4
    assert sum(bool(event.module) for event in trace.events) == 2 * 2 * 40
    sums = [event for event in trace.events if not event.module and event.stage == "set"]
    assert [(event.facts["modules"], event.seconds) for event in sums] == [(40, 10.0)] * 2


def test_the_timeline_of_a_server_is_bounded(tmp_path: Path) -> None:
    from lora_probe.recording.timeline import MAX_BYTES, Timeline

    timeline, written = Timeline(), 0
    for number in range(100_000):
        events = timeline.loading(Load(number, f"step-{number}", "/a", "d"))
        for module in range(3):
            events += timeline.admitted(LoadEvent(0.0, "set", "slot 1", f"model.layers.{module}.q_proj", 0.001))
        events += timeline.admitted(LoadEvent(0.0, "activate", "x" * 40, seconds=0.1))
        written += sum(len(json.dumps(event.text)) for event in events)
    assert timeline.dropped > 100_000
    assert written < MAX_BYTES
    (urgent,) = timeline.admitted(LoadEvent(0.0, "probe", "the probe failed"))
    assert urgent.stage == "probe"


def test_a_file_of_records_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MOST_RECORDS", 20_000)
    reported: list[str] = []
    with TraceWriter(tmp_path / "peft", process(), BOUND, reported.append) as writer:
        for number in range(1000):
            announce(writer, number, MODULES[0])
        writer.rows(step([0]))
    assert (tmp_path / "peft" / "events.jsonl").stat().st_size < 21_000
    trace = open_trace(tmp_path)
    assert 10 < len(trace.loads) < 100
    assert trace.dropped.lost_records == 3000 - sum(1 + len(ledger.rows) for _, ledger in trace.loads)
    assert [event.stage for event in trace.events] == ["lost"]
    assert reported == [trace.events[0].text]
    assert not trace.complete
    # Rows are still recorded.
    assert trace.rows is not None


def test_a_finding_is_written_once(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "peft", process()) as writer:
        announce(writer, 0, MODULES[0])
        for _ in range(100):
            writer.station(0, "placed", OK, [Q])
        writer.station(0, "applied", OK, [Q])
        for slot in (0, 0, 0, 1, 0):
            writer.record(Load(0, "adapter-0", "/a", "digest-0", slot=slot))
    ((load, _),) = open_trace(tmp_path).loads
    assert load.slot == 0
    lines = (tmp_path / "peft" / "events.jsonl").read_text().splitlines()
    assert sum('"kind":"station"' in line for line in lines) == 2
    # A later record of a load replaces the earlier one: each change counts.
    assert sum('"kind":"load"' in line for line in lines) == 1 + 3


def gram_of(rows: Rows, load: int, key: Key) -> Floats:
    gram = rows.placed[load].gram
    assert gram is not None
    return gram[rows.modules.index(key)]


def test_g_of_loads_of_different_ranks_is_as_wide_as_the_shrinks(mixed: Path) -> None:
    for rows in (open_trace(mixed).rows, open_trace(mixed).rows_of(1)):
        assert rows is not None
        assert rows.shrink is not None
        rank = rows.shrink.shape[-1]
        np.testing.assert_array_equal(gram_of(rows, 1, UP), np.diag([2, 2] + [0] * (rank - 2)))
