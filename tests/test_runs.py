"""Runs inside one trace folder: a server that starts again in the same folder, on one rank or on several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_trace_format import process, rows

from lora_probe import open_trace
from lora_probe.errors import UnreadableFile
from lora_probe.recording import Load, TraceWriter
from lora_probe.recording.runs import LAUNCH, begin_run


def record(folder: Path, launch: str, rank: int = 0) -> Path:
    run = begin_run(folder, f"vllm-rank-{rank}", launch)
    with TraceWriter(run / f"vllm-rank-{rank}", process(role="worker", rank=rank)) as writer:
        writer.record(Load(0, launch, "/a", "d"))
        if rank == 0:
            writer.rows(rows())
    return run


def test_each_launch_is_a_run_inside_the_folder(tmp_path: Path) -> None:
    trace = tmp_path / "t1.lptrace"
    assert [record(trace, name) for name in ("one", "two", "three")] == [trace, trace / "run-2", trace / "run-3"]
    newest = open_trace(trace)
    assert (newest.path, newest.loads[0][0].name) == (trace / "run-3", "three")
    assert newest.other_runs == (trace / "run-1", trace / "run-2")
    # An older one is opened by the path that is listed.
    for name, path in zip(("one", "two"), newest.other_runs, strict=True):
        older = open_trace(path)
        assert older.loads[0][0].name == name
        assert len(older.other_runs) == 2
        assert trace / "run-3" in older.other_runs


def test_one_run_has_no_others(tmp_path: Path) -> None:
    assert record(tmp_path, "one") == tmp_path
    assert open_trace(tmp_path).other_runs == ()
    with pytest.raises(UnreadableFile):
        open_trace(tmp_path / "run-7")


def test_a_run_that_recorded_nothing_is_not_the_newest(tmp_path: Path) -> None:
    record(tmp_path, "one")
    (tmp_path / "run-2").mkdir()
    assert open_trace(tmp_path).loads[0][0].name == "one"


def test_a_trace_of_an_older_version_is_the_first_run(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "vllm-rank-0", process(role="worker")) as writer:
        writer.record(Load(0, "old", "/a", "d"))
    assert record(tmp_path, "new") == tmp_path / "run-2"
    assert open_trace(tmp_path).loads[0][0].name == "new"
    assert open_trace(tmp_path / "run-1").loads[0][0].name == "old"


def test_a_folder_with_the_name_of_a_run_is_a_trace_of_its_own(tmp_path: Path) -> None:
    for name in ("run-1", "run-2"):
        record(tmp_path / name, name)
    for name in ("run-1", "run-2"):
        trace = open_trace(tmp_path / name)
        assert (trace.loads[0][0].name, trace.other_runs) == (name, ())


def test_a_link_in_place_of_a_run_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "elsewhere", "one")
    record(tmp_path / "trace", "two")
    (tmp_path / "trace" / "run-2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnreadableFile, match="is a symbolic link, not the folder of a run"):
        open_trace(tmp_path / "trace")


def test_a_run_that_trace_started_has_no_marker(tmp_path: Path) -> None:
    """`trace -o` replaces the folder of a run that failed only if it knows every file in it."""
    (tmp_path / "run.json").write_text("{}")
    assert begin_run(tmp_path, "vllm-rank-0", "one") == begin_run(tmp_path, "vllm-rank-1", "one") == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    (tmp_path / "vllm-rank-0").mkdir()
    assert begin_run(tmp_path, "vllm-rank-0", "two") == tmp_path / "run-2"


RANK = """
import sys
from pathlib import Path
from lora_probe.recording.runs import begin_run
folder, rank = Path(sys.argv[1]), sys.argv[2]
for line in sys.stdin:
    launch = line.strip()
    run = begin_run(folder, f"vllm-rank-{rank}", launch)
    (run / f"vllm-rank-{rank}").mkdir()
    (run / f"vllm-rank-{rank}" / "process.json").write_text("{}")
    print(run.name, flush=True)
"""


def test_ranks_that_begin_in_the_same_moment_agree(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(folder), str(rank)], stdin=-1, stdout=-1, text=True)
        for rank in range(3)
    ]
    for launch in range(40):
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"launch {launch}\n")
            rank.stdin.flush()
        names = {rank.stdout.readline().strip() for rank in ranks if rank.stdout is not None}
        assert names == {"trace" if launch == 0 else f"run-{launch + 1}"}
    for rank in ranks:
        rank.communicate()
    for run in (folder, folder / "run-40"):
        assert sorted(path.name for path in run.glob("vllm-rank-*")) == [f"vllm-rank-{rank}" for rank in range(3)]
        assert (run / LAUNCH).is_file()
        assert not list(run.glob("*.partial"))
