"""Terminals, widths and encodings: the same output whatever standard output and standard error are."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import traces

PROBE = [sys.executable, "-m", "lora_probe"]


def in_terminal(*arguments: object, **variables: str) -> str:
    """What a command prints in a terminal of 80 columns."""
    here, there = pty.openpty()
    command = [*PROBE, *map(str, arguments)]
    with subprocess.Popen(command, stdout=there, stderr=there, env={**os.environ, **variables}) as run:
        os.close(there)
        chunks = []
        while True:
            try:
                chunk = os.read(here, 65536)
            # Linux reports the end of a terminal as an error.
            except OSError:
                break
            chunks.append(chunk)
        os.close(here)
        run.wait(60)
    return b"".join(chunks).decode()


@pytest.mark.parametrize("command", [["--help"], ["check", "--help"], ["compare", "--help"]])
@pytest.mark.parametrize("variables", [{"TERM": "xterm"}, {"TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_help_begins_with_the_usage(command: list[str], variables: dict[str, str]) -> None:
    shown = re.sub(r"\x1b\[[0-9;]*m", "", in_terminal(*command, **variables))
    assert shown.startswith(" ".join(["Usage: lora-probe", *command[:-1], "[-h]"]))
    assert shown.count("sage:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["0", "1", "-5", "", "wide", "9" * 30])
def test_no_value_of_columns_empties_the_output(columns: str, tmp_path: Path) -> None:
    trace = traces.write(tmp_path / "run")
    environment = {**os.environ, "COLUMNS": columns}
    for command in (["show", str(trace)], ["show", "--help"]):
        run = subprocess.run([*PROBE, *command], env=environment, capture_output=True, text=True, check=True)
        lines = run.stdout.splitlines()
        assert any(line.startswith(("2 of 2 modules took effect", "Usage: lora-probe show")) for line in lines)
        assert max(map(len, lines)) <= 1000
    assert "Who are you?" in in_terminal("show", trace, COLUMNS=columns)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [*PROBE, "rule", "--all", "--format", "json"]
    run = subprocess.run(command, env=environment, capture_output=True, check=True)
    rules = json.loads(run.stdout.decode(encoding))["rules"]
    # Python would write it as `\xb7`, which JSON does not have.
    assert "s·B·A" in json.dumps(rules, ensure_ascii=False)


def test_no_empty_line_where_no_bar_is_shown(adapter: Path) -> None:
    command = [*PROBE, "inspect", str(adapter), "--norms"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stderr, "q_proj" in run.stdout) == ("", True)
    assert "reading" in in_terminal("inspect", adapter, "--norms", TERM="xterm")
