"""`collect`: what the nodes of one engine recorded on their own disks becomes one trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import call
from served import A, B, mixed

from lora_probe import open_trace
from lora_probe.recording import SCHEMA, Prompt, Run, RunSpec, write_json
from lora_probe.recording.runs import LAUNCH


def node(folder: Path, rank: int, launch: str = "engine 0") -> Path:
    """What one node has: a process of its own, and the mark of the launch."""
    mixed(folder, A, B)
    if rank:
        (folder / "vllm-rank-0").rename(folder / f"vllm-rank-{rank}")
        path = folder / f"vllm-rank-{rank}" / "process.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rank": rank}))
    (folder / LAUNCH).write_text(json.dumps({"launch": launch, "created": "2026-01-01T00:00:00+00:00"}))
    return folder


def test_two_nodes_become_one_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node(tmp_path / f"node-{rank}", rank) for rank in range(2)]
    one = call("show", nodes[0], capsys=capsys)[1]
    status, out, err = call("collect", *nodes, "-o", tmp_path / "run.lptrace", capsys=capsys)
    assert status == 0
    assert f"wrote {tmp_path / 'run.lptrace'}" in err
    # Both ranks have whole layers here, so the numbers are those of one.
    assert out.replace(str(tmp_path / "run.lptrace"), "") == one.replace(str(nodes[0]), "")
    trace = open_trace(tmp_path / "run.lptrace")
    assert [worker.process.rank for worker in trace.workers] == [0, 1]
    assert trace.complete
    assert {entry.name for entry in tmp_path.iterdir()} == {"node-0", "node-1", "run.lptrace"}


def test_a_run_of_trace_has_its_request_on_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node(tmp_path / f"node-{rank}", rank) for rank in range(2)]
    for folder in nodes:
        (path,) = folder.glob("vllm-rank-*/process.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"launch": "engine 0"}))
    (nodes[0] / LAUNCH).unlink()
    spec = RunSpec("vllm", "/adapters/A", "A", "/models/base", [Prompt("hello")], 4)
    write_json(nodes[0] / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, {}))
    status, _, err = call("collect", *nodes, "-o", tmp_path / "run.lptrace", capsys=capsys)
    assert status == 0, err
    trace = open_trace(tmp_path / "run.lptrace")
    assert trace.run is not None
    assert len(trace.workers) == 2


def test_what_is_not_of_one_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = node(tmp_path / "first", 0), node(tmp_path / "other", 1, "engine 1")
    out = tmp_path / "run.lptrace"
    status, _, err = call("collect", first, other, "-o", out, capsys=capsys)
    assert status == 2
    assert "are of different starts of an engine" in err
    status, _, err = call("collect", first, first, "-o", out, capsys=capsys)
    assert status == 0
    again = shutil.copytree(first, tmp_path / "again")
    shutil.rmtree(out)
    status, _, err = call("collect", first, again, "-o", out, capsys=capsys)
    assert status == 2
    assert "both have `vllm-rank-0`" in err
    assert not out.exists()


def test_what_is_in_the_way(tmp_path: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call("collect", good, "-o", good, capsys=capsys)
    assert status == 2
    assert "already exists" in err
    status, _, err = call("collect", tmp_path, "-o", tmp_path / "new", capsys=capsys)
    assert status == 2
    assert "is not a trace" in err
    (tmp_path / "file").write_text("")
    status, _, err = call("collect", good, "-o", tmp_path / "file" / "new", capsys=capsys)
    assert status == 2
    assert "cannot write" in err


def test_links_out_of_a_node_are_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = node(tmp_path / "first", 0)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (first / "vllm-rank-0" / "more").symlink_to(secret)
    status, _, err = call("collect", first, "-o", tmp_path / "run.lptrace", capsys=capsys)
    assert status == 2
    assert "symbolic link that leads out of its folder" in err
    assert not (tmp_path / "run.lptrace").exists()
