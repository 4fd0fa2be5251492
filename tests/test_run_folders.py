"""The folders of runs: what --force overwrites, and what is in use."""

from __future__ import annotations

from pathlib import Path

import pytest
import traces

from lora_probe.engines.folder import BEFORE, LOG, folder_for, lock
from lora_probe.errors import ProbeError
from lora_probe.merging.parity import REPORT, _workplace


def unfinished(folder: Path) -> Path:
    """A trace whose process was killed."""
    traces.write(folder)
    process = folder / "peft" / "process.json"
    process.write_text(process.read_text().replace('"closed": true', '"closed": false'))
    return folder


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_in_use_is_left_alone(force: bool, tmp_path: Path) -> None:
    trace = traces.write(tmp_path / "run.lptrace")
    with (trace / LOG).open("ab") as log:
        lock(log)
        with pytest.raises(ProbeError, match="is being recorded by another process") as refused:
            folder_for("a", "peft", trace, force)
        assert "--force" not in refused.value.hint
        assert (trace / "run.json").exists()
    # The lock ends with the file.
    if force:
        assert list(folder_for("a", "peft", trace, force).iterdir()) == []


def test_an_incomplete_recording_is_called_so(tmp_path: Path) -> None:
    for trace, state in (
        (traces.write(tmp_path / "whole"), "already exists"),
        (unfinished(tmp_path / "part"), "contains an incomplete recording"),
    ):
        with pytest.raises(ProbeError, match=state) as refused:
            folder_for("a", "peft", trace, force=False)
        assert "--force" in refused.value.hint


def test_the_last_whole_trace_outlives_interrupted_runs(tmp_path: Path) -> None:
    trace, before = traces.write(tmp_path / "run"), tmp_path / f"run{BEFORE}"
    (trace / "whole").touch()
    folder_for("a", "peft", trace, force=True)
    assert (before / "whole").exists()
    trace.rmdir()
    unfinished(trace)
    folder_for("a", "peft", trace, force=True)
    assert (before / "whole").exists()
    assert list(trace.iterdir()) == []


def test_a_parity_in_use_is_left_alone(tmp_path: Path) -> None:
    with (
        _workplace(tmp_path / "out", False, 0),
        pytest.raises(ProbeError, match="is being written by another process"),
        _workplace(tmp_path / "out", True, 0),
    ):
        pass
    assert (tmp_path / "out" / REPORT).exists()
    with _workplace(tmp_path / "out", True, 0) as folder:
        assert [path.name for path in folder.iterdir()] == [REPORT]


def test_only_a_run_that_failed_is_replaced_without_force(tmp_path: Path) -> None:
    """error.json is not a rare name: a folder of somebody's own may hold one."""
    failed = tmp_path / "failed"
    failed.mkdir()
    for name in ("run.json", "error.json", LOG):
        (failed / name).write_text("{}")
    assert list(folder_for("a", "vllm", failed, force=False).iterdir()) == []
    for name in ("run.json", "error.json", "thesis.tex"):
        (failed / name).write_text("{}")
    with pytest.raises(ProbeError, match="contains an incomplete recording"):
        folder_for("a", "vllm", failed, force=False)
    assert (failed / "thesis.tex").exists()
