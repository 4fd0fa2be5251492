"""Rows of several loads in one trace: each is measured with the G of its own load, not of the load that ran last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from traces import resaved

import lora_probe
from lora_probe import open_trace
from lora_probe.adapter.spectrum import gram
from lora_probe.comparison import compare_each
from lora_probe.comparison.contributions import compare_traces as compare
from lora_probe.errors import ProbeError
from lora_probe.ledger import OK, STATIONS, Finding
from lora_probe.names import Key
from lora_probe.recording import (
    SCHEMA,
    Floats,
    Load,
    ModuleRecord,
    Placed,
    Process,
    RequestRecord,
    Rows,
    Trace,
    TraceWriter,
)
from lora_probe.recording.placed import digest_of, grams_of

KEYS = (("model.layers.0.q_proj", "weight", None), ("model.layers.0.v_proj", "weight", None))
PROMPT, ANSWER = [1, 2, 3, 4], [5, 6]
POSITIONS = len(PROMPT) + len(ANSWER) - 1
INPUTS, OUTPUTS, RANK = 16, 24, 4
PROCESS = Process(SCHEMA, "engine", "peft", 0, 1, {}, dtype="float32")


@dataclass(frozen=True)
class Served:
    """One load of an adapter at two modules, and the rows of a request for it. `load` -1: a request for the base."""

    load: int
    a: Floats
    b: Floats
    x: Floats

    @property
    def placed(self) -> dict[int, Placed]:
        if self.load < 0:
            return {}
        digests = tuple(digest_of(self.a, self.b) for _ in KEYS)
        return {self.load: Placed(digests, np.stack([gram(self.b) for _ in KEYS]))}

    def rows(self, request: str) -> Rows:
        shrink = np.stack([self.x @ self.a.T] * len(KEYS), axis=1)
        delta = np.linalg.norm(shrink @ self.b.T, axis=-1) * (self.load >= 0)
        ones = np.ones((POSITIONS, len(KEYS)), np.float32)
        return Rows(
            modules=KEYS,
            requests=(request,),
            request=np.zeros(POSITIONS, np.int32),
            position=np.arange(POSITIONS, dtype=np.int32),
            phase=np.zeros(POSITIONS, np.int8),
            load=np.full(POSITIONS, self.load, np.int32),
            x_norm=ones,
            base_norm=ones,
            delta_norm=delta.astype(np.float32),
            output_norm=ones,
            shrink=shrink * (self.load >= 0),
            placed=self.placed,
        )


def served(load: int, scale: float = 1.0, seed: int = 0) -> Served:
    """A load whose B is `scale` times the common one."""
    numbers = np.random.default_rng(seed)
    a, b = (numbers.normal(size=shape).astype(np.float32) for shape in ((RANK, INPUTS), (OUTPUTS, RANK)))
    x = np.random.default_rng(9).normal(size=(POSITIONS, INPUTS)).astype(np.float32)
    return Served(load, a, b * np.float32(scale), x)


def announce(writer: TraceWriter, number: int, keys: Sequence[Key]) -> None:
    """A load that is healthy at `keys`."""
    writer.record(Load(number, f"adapter-{number}", "/a", f"digest-{number}"))
    for key in keys:
        writer.record(ModuleRecord(number, *key, ["file"]))
    for station in STATIONS:
        writer.station(number, station, OK, keys)


def write(folder: Path, loads: Sequence[Served], flush: bool = False) -> Trace:
    """A trace of one request for each of `loads`, all with one prompt and healthy ledgers."""
    with TraceWriter(folder / "peft", PROCESS) as writer:
        for number in sorted({one.load for one in loads if one.load >= 0}):
            announce(writer, number, KEYS)
        for number, one in enumerate(loads):
            name = f"adapter-{one.load}" if one.load >= 0 else None
            writer.request(RequestRecord(f"request-{number}", 0, name, PROMPT, ANSWER, ""))
            writer.rows(one.rows(f"request-{number}"))
            if flush:
                writer.flush()
    return open_trace(folder)


def as_before(trace: Trace) -> Trace:
    """The same trace in the layout that was written before loads had a G each: one of the load that ran last."""

    def change(tensors: dict[str, Any], meta: dict[str, str]) -> None:
        table = json.loads(meta["table"])
        *_, last = table.pop("loads") or [{"placed": []}]
        if "grams" in tensors:
            tensors["gram"] = np.array(tensors.pop("grams")[-1])
        meta["table"] = json.dumps(table | {"placed": last["placed"]})

    for segment in (trace.path / "peft").glob("0*.safetensors"):
        resaved(segment, change)
    return open_trace(trace.path)


BOTH = [served(0, 1), served(1, 100)]


@pytest.mark.parametrize("layout", ["one segment", "a segment each", "a segment each, as before"])
@pytest.mark.parametrize("loads", [BOTH, BOTH[::-1], [*BOTH, served(-1)], [served(-1), *BOTH]])
def test_each_row_has_the_gram_of_its_load(loads: list[Served], layout: str, tmp_path: Path) -> None:
    trace = write(tmp_path / "run", loads, flush=layout != "one segment")
    rows = as_before(trace).rows if layout.endswith("as before") else trace.rows
    assert rows is not None
    assert sorted(rows.placed) == [0, 1]
    assert rows.shrink is not None
    for row, load in enumerate(rows.load.tolist()):
        for module in range(len(KEYS)):
            held = grams_of(rows.placed, load, module)
            if load < 0:
                assert held is None
                continue
            assert held is not None
            shrink = rows.shrink[row, module]
            np.testing.assert_allclose(np.sqrt(shrink @ held.gram @ shrink), rows.delta_norm[row, module], rtol=1e-5)


@pytest.mark.parametrize("flush", [False, True], ids=["one segment", "a segment each"])
@pytest.mark.parametrize("loads", [BOTH, BOTH[::-1], [*BOTH, served(-1)]])
def test_two_loads_agree_with_themselves(loads: list[Served], flush: bool, tmp_path: Path) -> None:
    trace = write(tmp_path / "run", loads, flush)
    report = compare(trace, trace)
    assert report.verdict == "agree"
    assert report.rows == 2 * POSITIONS
    assert [(module.error, module.exact) for module in report.modules] == [(0.0, True)] * len(KEYS)


def test_rows_of_a_level_without_shrink_are_compared_by_their_norms(tmp_path: Path) -> None:
    """The level of a server was raised while it recorded."""
    whole = write(tmp_path / "whole", [BOTH[0], BOTH[0]], flush=True)
    raised = write(tmp_path / "raised", [BOTH[0], BOTH[0]], flush=True)
    resaved(raised.path / "peft" / "000001.safetensors", lambda tensors, _: tensors.pop("shrink"))
    report = compare(whole, open_trace(raised.path))
    assert report.verdict == "agree"
    assert [(module.error, module.exact) for module in report.modules] == [(0.0, False)] * len(KEYS)


def test_two_loads_agree_in_whichever_order_they_ran(tmp_path: Path) -> None:
    report = compare(write(tmp_path / "one", BOTH), write(tmp_path / "two", BOTH[::-1]))
    assert report.verdict == "agree"
    assert {module.error for module in report.modules} == {0.0}


def test_a_difference_is_as_large_as_its_own_load_makes_it(tmp_path: Path) -> None:
    """The shrink of the small load is a tenth off. Weighed with the G of the large one, it would be ten times delta."""
    moved = replace(BOTH[0], a=BOTH[0].a * np.float32(1.1))
    report = compare(write(tmp_path / "reference", BOTH), write(tmp_path / "candidate", [moved, BOTH[1]]))
    assert report.verdict == "differ"
    # Half of the rows are a tenth off.
    assert report.modules[0].error == pytest.approx(0.1 / np.sqrt(2), rel=1e-3)
    assert not report.modules[0].exact
    assert report.first is not None
    assert (report.first.key, report.first.position) == (KEYS[0], 0)


def test_another_b_is_named_with_its_size(tmp_path: Path) -> None:
    alone = write(tmp_path / "alone", [served(0, 1)])
    report = compare(alone, write(tmp_path / "other", [served(0, 100)]))
    assert report.verdict == "differ"
    assert [module.exact for module in report.modules] == [False, False]
    # ‖99·delta‖ / ‖delta‖, relative to the usual row.
    assert report.modules[0].error == pytest.approx(99, rel=1e-3)


def test_a_row_of_no_load_is_compared_by_its_norm_alone(tmp_path: Path) -> None:
    """A row that the engine gave to no load has no G, and nobody else's."""
    both = write(tmp_path / "both", [served(0, 1), served(1, 100)])
    lost = served(1, 100)
    rows = lost.rows("request-1")
    with TraceWriter(tmp_path / "lost" / "peft", PROCESS) as writer:
        for number in (0, 1):
            announce(writer, number, KEYS)
        writer.request(RequestRecord("request-0", 0, "adapter-0", PROMPT, ANSWER, ""))
        writer.request(RequestRecord("request-1", 0, "adapter-1", PROMPT, ANSWER, ""))
        writer.rows(served(0, 1).rows("request-0"))
        writer.rows(replace(rows, load=np.full(POSITIONS, -1, np.int32), delta_norm=np.zeros_like(rows.delta_norm)))
    report = compare(both, open_trace(tmp_path / "lost"))
    assert report.verdict == "differ"
    assert [module.exact for module in report.modules] == [False, False]
    # Half of the rows lack their contribution.
    assert report.modules[0].error == pytest.approx(1 / np.sqrt(2), rel=1e-3)


def test_each_adapter_is_compared_with_its_counterpart(tmp_path: Path) -> None:
    """A difference in one adapter is not one of the other, and neither are rows of its requests without its load."""
    whole = write(tmp_path / "whole", BOTH)
    moved = write(tmp_path / "moved", [BOTH[0], replace(BOTH[1], a=BOTH[1].a * np.float32(1.1))])
    result = compare_each(whole, moved)
    assert {name: one.verdict for name, one in result.by_adapter.items()} == {
        "adapter-0": "agree",
        "adapter-1": "differ",
    }
    assert result.verdict == "differ"
    assert result.by_adapter["adapter-1"].modules[0].error == pytest.approx(0.1, rel=1e-3)
    assert list(compare_each(whole, moved, adapter="adapter-0").by_adapter) == ["adapter-0"]
    assert compare_each(whole, whole).verdict == "agree"


def test_rows_that_ran_without_their_load_are_compared(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", BOTH)
    rows = BOTH[1].rows("request-1")
    with TraceWriter(tmp_path / "lost" / "peft", PROCESS) as writer:
        for number in (0, 1):
            announce(writer, number, KEYS)
            writer.request(RequestRecord(f"request-{number}", 0, f"adapter-{number}", PROMPT, ANSWER, ""))
        writer.rows(BOTH[0].rows("request-0"))
        writer.rows(replace(rows, load=np.full(POSITIONS, -1, np.int32), delta_norm=np.zeros_like(rows.delta_norm)))
    result = compare_each(whole, open_trace(tmp_path / "lost"))
    assert {name: one.verdict for name, one in result.by_adapter.items()} == {
        "adapter-0": "agree",
        "adapter-1": "differ",
    }


def test_an_adapter_without_a_counterpart_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, one = write(tmp_path / "whole", BOTH), write(tmp_path / "one", [BOTH[1]])
    result = compare_each(whole, one)
    assert list(result.by_adapter) == ["adapter-1"]
    assert result.notes == (f"adapter `adapter-0` is only in {whole.path}",)
    assert result.verdict == "undecided"
    status, out, _ = call("compare", whole.path, one.path, capsys=capsys)
    assert status == 2
    assert "adapter `adapter-0` is only in" in out
    assert out.splitlines()[0] == "undecided: not every adapter has a counterpart; the traces agree on adapter-1"
    status, out, _ = call("compare", whole.path, one.path, "--adapter", "adapter-1", "--format", "json", capsys=capsys)
    assert (status, json.loads(out)["verdict"]) == (0, "agree")
    status, _, error = call("compare", whole.path, one.path, "--adapter", "none", capsys=capsys)
    assert status == 2
    assert "pass one of: adapter-0, adapter-1" in error
    status, out, _ = call("compare", whole.path, whole.path, "--format", "json", capsys=capsys)
    assert [one["adapter"] for one in json.loads(out)["comparisons"]] == ["adapter-0", "adapter-1"]
    with pytest.raises(ProbeError, match="neither trace has an adapter `typo`"):
        compare_each(one, one, adapter="typo")
    with pytest.raises(ProbeError, match="several adapters: adapter-0, adapter-1"):
        lora_probe.compare(whole, whole)
    assert lora_probe.compare(whole, whole, adapter="adapter-0").verdict == "agree"


def test_a_wrong_load_counts_although_a_newer_one_is_healthy(tmp_path: Path) -> None:
    """The rows ran with the first one."""
    healthy = write(tmp_path / "healthy", [served(0)])
    with TraceWriter(tmp_path / "reloaded" / "peft", PROCESS) as writer:
        announce(writer, 0, KEYS)
        writer.station(0, "agrees", Finding("wrong", "LP604", "by 1"), KEYS)
        writer.record(Load(1, "adapter-0", "/a", "digest-0", generation=1))
        for key in KEYS:
            writer.record(ModuleRecord(1, *key, ["file"]))
        for station in STATIONS:
            writer.station(1, station, OK, KEYS)
        writer.request(RequestRecord("request-0", 0, "adapter-0", PROMPT, ANSWER, ""))
        writer.rows(served(0).rows("request-0"))
    reloaded = open_trace(tmp_path / "reloaded")
    for one, two in ((healthy, reloaded), (reloaded, healthy)):
        assert lora_probe.compare(one, two).verdict == "differ"


def test_adapters_of_one_content_have_a_counterpart_each(tmp_path: Path) -> None:
    whole, one = write(tmp_path / "whole", BOTH), write(tmp_path / "one", [BOTH[0]])
    file = whole.path / "peft" / "events.jsonl"
    file.write_text(file.read_text().replace("digest-1", "digest-0"))
    result = compare_each(open_trace(whole.path), one)
    assert list(result.by_adapter) == ["adapter-0"]
    assert result.notes == (f"adapter `adapter-1` is only in {whole.path}",)


def test_the_same_adapter_under_another_name(tmp_path: Path) -> None:
    """By content; with other content it has to be chosen."""
    alone = [write(tmp_path / str(number), [BOTH[number]]) for number in (0, 1)]
    whole = write(tmp_path / "whole", BOTH)
    renamed = tmp_path / "renamed.lptrace"
    shutil.copytree(alone[0].path, renamed)
    for name in ("events.jsonl", "requests.jsonl"):
        file = renamed / "peft" / name
        file.write_text(file.read_text().replace('"adapter-0"', '"other"'))
    assert list(compare_each(open_trace(renamed), whole).by_adapter) == ["other"]
    file = renamed / "peft" / "events.jsonl"
    file.write_text(file.read_text().replace("digest-0", "digest-x"))
    with pytest.raises(ProbeError, match="no adapter in common: other; adapter-0 and adapter-1"):
        compare_each(open_trace(renamed), whole)


@pytest.mark.parametrize("flush", [False, True], ids=["one segment", "a segment each"])
def test_a_slot_that_was_filled_with_something_else_has_no_gram(flush: bool, tmp_path: Path) -> None:
    """One load, evicted and put into its slot again, where other numbers lie now: no G holds for all of its rows."""
    trace = write(tmp_path / "run", [served(0, 1), served(0, 3)], flush)
    assert trace.rows is not None
    assert grams_of(trace.rows.placed, 0, 0) is None
    assert trace.rows.placed[0].digests == ("", "")
    # Each segment has its own all the same.
    one, two = (segment.placed[0].gram for segment in trace.workers[0].segments())
    assert one is not None
    np.testing.assert_allclose(two, 9 * one, rtol=1e-5)
    same = write(tmp_path / "same", [served(0, 1), served(0, 1)], flush).rows
    assert same is not None
    assert grams_of(same.placed, 0, 0) is not None


def test_modules_that_only_one_load_has(tmp_path: Path) -> None:
    """The modules of a second load are compared as well, and what only it has is missed where it is gone."""

    def alone(folder: Path, keys: Sequence[int]) -> Trace:
        with TraceWriter(folder / "peft", PROCESS) as writer:
            for number, key in enumerate(KEYS):
                announce(writer, number, [key])
                writer.request(RequestRecord(f"request-{number}", 0, f"adapter-{number}", PROMPT, ANSWER, ""))
            for number in keys:
                one, columns = served(number), [number]
                rows = one.rows(f"request-{number}")
                assert rows.shrink is not None
                table = one.placed[number]
                assert table.gram is not None
                writer.rows(
                    replace(
                        rows,
                        modules=(KEYS[number],),
                        shrink=rows.shrink[:, columns],
                        placed={number: Placed(table.digests[:1], table.gram[columns])},
                        **{
                            name: getattr(rows, name)[:, columns]
                            for name in ("x_norm", "base_norm", "delta_norm", "output_norm")
                        },
                    )
                )
        return open_trace(folder)

    both, first = alone(tmp_path / "both", [0, 1]), alone(tmp_path / "first", [0])
    assert [module.status for module in compare(both, both).modules] == ["ok", "ok"]
    assert [module.status for module in compare(both, first).modules] == ["ok", "only in reference"]
    assert compare(both, both).verdict == "agree"


def test_an_old_segment_of_two_loads_has_the_same_numbers_in_both(tmp_path: Path) -> None:
    """The old writer closed a segment when the digests changed, so its G is that of every load in it."""
    trace = as_before(write(tmp_path / "run", [served(0), served(1), served(-1)]))
    assert trace.rows is not None
    assert sorted(trace.rows.placed) == [0, 1]
    assert trace.rows.placed[0].digests == trace.rows.placed[1].digests
    assert [module.exact for module in compare(trace, trace).modules] == [True, True]


RECORDED = Path(__file__).parent / "data" / "schema-1.lptrace"
"""By PEFT, with lora-probe 0.1.0: nine modules, three prompts, in the layout from before."""


def test_a_trace_recorded_before_opens(capsys: pytest.CaptureFixture[str]) -> None:
    rows = open_trace(RECORDED).rows
    assert rows is not None
    assert rows.shrink is not None
    assert list(rows.placed) == [0]
    gram = rows.placed[0].gram
    assert gram is not None
    norms = np.sqrt(np.einsum("nmr,mrs,nms->nm", rows.shrink, gram, rows.shrink))
    np.testing.assert_allclose(norms, rows.delta_norm, rtol=1e-4)
    status, out, _ = call("show", RECORDED, capsys=capsys)
    assert (status, "9 of 9 modules took effect" in out) == (0, True)
    status, out, _ = call("compare", RECORDED, RECORDED, "--format", "json", capsys=capsys)
    report = json.loads(out)
    assert (status, report["verdict"], report["rows"]) == (0, "agree", len(rows))
    assert [(module["error"], module["exact"]) for module in report["modules"]] == [(0.0, True)] * 9
