"""The requests of a trace: ids of the client and of the engine, how each was served, findings, rows computed again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from test_trace_format import KEYS, process, rows
from traces import resaved

from lora_probe import open_trace
from lora_probe.comparison import compare
from lora_probe.comparison.totals import totals
from lora_probe.errors import UnreadableFile
from lora_probe.ledger import OK, STATIONS
from lora_probe.recording import Load, ModuleRecord, RequestFinding, RequestRecord, Served, TraceWriter
from lora_probe.recording.requests import client_id, client_ids, joined_findings
from lora_probe.recording.rows import concatenate
from lora_probe.render.json.trace import recording_json
from lora_probe.render.results import Recording

FINDING = RequestFinding(0, "LP602", "48 rows of 1 request that did not ask for `a` got its contribution: x", 48, ["x"])


def write(folder: Path, *findings: RequestFinding, request: str = "a-0123abcd", served: Served | None = None) -> Path:
    """A healthy load, one answer of the client, and the rows of `request`."""
    with TraceWriter(folder / "vllm-rank-0", process(engine="vllm", dtype="float32")) as writer:
        writer.record(Load(0, "a", "/a", "d"))
        writer.record(ModuleRecord(0, *KEYS[0], ["file"]))
        for station in STATIONS:
            writer.station(0, station, OK, KEYS[:1])
        for finding in findings:
            writer.record(finding)
        writer.request(RequestRecord("a", 0, "a", [1, 2, 3], [4, 5], "x"))
        step = rows(request=request, keys=KEYS[:1])
        writer.rows(replace(step, served={request: served} if served else {}))
    return folder


@pytest.mark.parametrize(
    ("engine", "client"),
    [
        ("cmpl-1-0-0123abcd", "cmpl-1-0"),
        ("0-0123abcd", "0"),
        ("0-0123ABCD", "0-0123ABCD"),
        ("0-123abcd", "0-123abcd"),
        ("-0123abcd", "-0123abcd"),
        ("adapter", "adapter"),
    ],
)
def test_the_clients_id(engine: str, client: str) -> None:
    assert client_id(engine) == client


def test_ids_are_replaced_where_they_are_certain() -> None:
    ids = ["a-0123abcd", "b-00000000", "b-11111111", "c-22222222", "d-33333333"]
    # Two requests have the id `b`; `c` has no answer; `d-33333333` is the client's own id.
    assert client_ids(ids, {"a", "b", "d-33333333", "d"}) == ("a", *ids[1:])


def test_rows_join_with_the_answers(tmp_path: Path) -> None:
    trace = open_trace(write(tmp_path, served=Served(3, 1)))
    assert trace.rows is not None
    assert trace.rows.requests == ("a",)
    assert trace.rows.served == {"a": Served(3, 1)}
    # On disk they have the engine's id.
    (segment,) = trace.processes[0].segments()
    assert segment.requests == ("a-0123abcd",)
    comparison = compare(trace, trace)
    assert (comparison.verdict, comparison.rows) == ("agree", 4)


def test_how_requests_were_served(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "vllm-rank-0", process()) as writer:
        for number, preemptions in enumerate((0, 1)):
            facts = {"a": Served(3, 2, [0, -1], preemptions)}
            writer.rows(replace(rows(request="a", start=4 * number), served=facts))
            writer.flush()
        writer.rows(rows(request="b"))
    trace = open_trace(tmp_path)
    assert trace.rows is not None
    # The last segment knows most; nothing is reported of a request that an older writer recorded.
    assert trace.rows.served == {"a": Served(3, 2, [0, -1], 1)}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"served": [None, None]}, "its table describes 2 of 1 requests"),
        ({"served": [{"prompt": "3"}]}, "its table cannot be read"),
        ({"served": 3}, "its table cannot be read"),
    ],
)
def test_a_damaged_table(tmp_path: Path, table: dict[str, Any], words: str) -> None:
    write(tmp_path, served=Served(3))

    def change(tensors: dict[str, Any], meta: dict[str, str]) -> None:
        meta["table"] = json.dumps(json.loads(meta["table"]) | table)

    resaved(tmp_path / "vllm-rank-0" / "000001.safetensors", change)
    with pytest.raises(UnreadableFile, match=words):
        open_trace(tmp_path).rows  # noqa: B018


def test_rows_that_were_computed_again(tmp_path: Path) -> None:
    first = replace(rows(4), delta_norm=np.full((4, 2), 9, np.float32))
    both = concatenate([first, rows(3, start=1), rows(2, request="b")])
    with TraceWriter(tmp_path / "vllm-rank-0", process()) as writer:
        writer.rows(both)
    ((entry, _),) = totals(open_trace(tmp_path), [0]).contributions.values()
    assert entry.rows == 6
    assert entry.delta_norm == pytest.approx(np.sqrt(9**2 + 5 * 2**2))


def test_the_last_total_of_a_rank_and_the_largest_of_all_ranks() -> None:
    def total(count: int, code: str = "LP602") -> RequestFinding:
        return RequestFinding(0, code, "", count, [])

    ranks = [[total(12), total(48), total(3, "LP606")], [total(50), total(47)]]
    assert joined_findings(ranks) == (total(48), total(3, "LP606"))


def test_a_finding_about_requests_is_shown_and_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, wrong = write(tmp_path / "clean"), write(tmp_path / "wrong", FINDING)
    assert call("show", clean, capsys=capsys)[0] == 0
    status, out, _ = call("show", wrong, capsys=capsys)
    assert status == 1
    text = " ".join(out.split())
    assert "1 of 1 modules took effect" in text
    assert f"{FINDING.message} (LP602)" in text
    assert "LP602 contamination: do not mix requests" in text
    data = recording_json(Recording(open_trace(wrong)))
    assert data["loads"][0]["request_findings"] == [
        {"code": "LP602", "message": FINDING.message, "rows": 48, "requests": ["x"], "more": 0}
    ]
    assert [(entry["code"], entry["name"]) for entry in data["diagnostics"]] == [("LP602", "contamination")]
    comparison = compare(open_trace(clean), open_trace(wrong))
    assert comparison.verdict == "differ"
    assert [(cause.code, cause.side) for cause in comparison.causes] == [("LP602", "candidate")]


def test_a_rule_of_a_newer_version_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = RequestFinding(0, "LP699", "something new: \x1b[31m", 1, ["x\n"])
    status, out, _ = call("show", write(tmp_path / "run", newer), capsys=capsys)
    assert status == 1
    assert "LP699 unknown-rule" in out
    assert "\x1b[31m" not in out
