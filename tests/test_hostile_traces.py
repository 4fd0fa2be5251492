"""Untrusted traces: `show` and `compare` print one clear error, or a correct answer.

This file tests which files are opened, their text, and other damage; `test_hostile_segments.py` tests the rows.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_trace_format import KEYS
from traces import (
    GIB,
    SCORE,
    SECOND,
    SEGMENT,
    TABLE,
    Damage,
    header,
    refused,
    replaced,
    sparse,
    write,
)

from lora_probe import open_trace
from lora_probe.comparison import compare
from lora_probe.errors import ProbeError
from lora_probe.recording import SCHEMA
from lora_probe.recording.documents import MAX_DOCUMENT, MAX_LINES
from lora_probe.recording.segments import MAX_SEGMENT
from lora_probe.render.results import Recording
from lora_probe.render.text.compare import comparison
from lora_probe.render.text.trace import recording

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("bounded")]

fuzzed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_the_trace_is_good(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call("show", good, capsys=capsys)
    assert (status, err) == (0, "")
    assert "2 of 2 modules took effect" in out
    assert call("compare", good, good, capsys=capsys)[0] == 0
    found = open_trace(good).rows
    assert found is not None
    assert (len(found), found.modules) == (8, KEYS)
    assert [set(table or ()) for table in (found.x, found.base, found.delta)] == [set(KEYS)] * 3
    assert np.isnan(found.sketch[4:, 1]).all()
    assert np.isnan(found.x[KEYS[1]][4:]).all()


# Files that are no regular files, lie elsewhere, or are far too large.

ZEROS = {"dtype": "F32", "shape": [2**17, 2**17], "data_offsets": [0, 2**36]}
HUGE = header({"__metadata__": {"table": json.dumps(TABLE)}, "x_norm": ZEROS})
OPENED = ("run.json", "peft/process.json", "peft/events.jsonl", "peft/requests.jsonl", SEGMENT)


@pytest.mark.parametrize("name", OPENED)
def test_a_pipe(damaged: Path, good: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    replaced(name, os.mkfifo)(damaged)
    refused(damaged, good, f"{name}` is a pipe, not a regular file", capsys)


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("target", ["/dev/zero", "elsewhere", "nowhere"])
def test_a_link_out_of_the_trace(
    damaged: Path, good: Path, name: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = Path(target) if target.startswith("/") else tmp_path / target
    if target == "elsewhere":
        # Even where the link leads to the very content.
        shutil.copy(damaged / name, where)
    replaced(name, lambda path: path.symlink_to(where))(damaged)
    refused(damaged, good, f"{name}` is a symbolic link that leads out of its folder", capsys)


def test_a_link_within_the_trace_and_within_a_cache(good: Path, tmp_path: Path) -> None:
    """Hugging Face's cache links every file of a snapshot to a blob of the same repository."""
    home = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(good, home)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, name in enumerate((*OPENED, SECOND, SCORE)):
        blob = tmp_path / "models--a--b" / "blobs" / str(number)
        shutil.move(home / name, blob)
        (home / name).symlink_to(os.path.relpath(blob, (home / name).parent))
    trace = open_trace(home)
    assert trace.rows is not None
    assert len(trace.rows) == 8
    assert len(trace.scores) == 2


def test_a_linked_process_folder(damaged: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (damaged / "worker").symlink_to(good / "peft")
    refused(damaged, good, "worker` is a symbolic link, not a folder that a process wrote", capsys)


def test_links_that_are_no_processes_are_left_alone(damaged: Path, tmp_path: Path) -> None:
    (damaged / "notes").symlink_to(tmp_path)
    (damaged / "circle").symlink_to(damaged / "circle")
    assert len(open_trace(damaged).processes) == 1


def test_a_process_folder_with_an_odd_name(damaged: Path, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(damaged / "peft", damaged / "a\n::error::b\x1b[31m")
    refused(damaged, good, "has an invalid name: `a\\n", capsys)


def test_files_with_names_that_nobody_gives_are_not_read(damaged: Path) -> None:
    for name in ("1\n::error::.safetensors", "1x.safetensors", "²2.safetensors", "9" * 30 + ".safetensors"):
        os.mkfifo(damaged / "peft" / name)
    assert open_trace(damaged).rows is not None


@pytest.mark.parametrize(
    ("name", "put", "words"),
    [
        ("run.json", sparse(MAX_DOCUMENT + 1), f"bytes, more than the limit of {MAX_DOCUMENT}"),
        ("run.json", sparse(1000), "malformed"),
        ("peft/process.json", sparse(8 * GIB, b"{"), f"bytes, more than the limit of {MAX_DOCUMENT}"),
        ("peft/events.jsonl", sparse(MAX_LINES + 1), f"bytes, more than the limit of {MAX_LINES}"),
        ("peft/events.jsonl", sparse(MAX_DOCUMENT), f"line 1: it has more than {MAX_DOCUMENT} bytes"),
        ("peft/requests.jsonl", sparse(8 * GIB, b"{}\n"), f"bytes, more than the limit of {MAX_LINES}"),
        (SEGMENT, sparse(len(HUGE) + 2**36, HUGE), f"more than the limit of {MAX_SEGMENT}"),
        (SEGMENT, sparse(4 * GIB), "has a damaged safetensors header"),
        (SEGMENT, sparse(4 * GIB, struct.pack("<Q", 2**32 - 8)), "its header claims"),
    ],
)
def test_sparse_files(
    damaged: Path, good: Path, name: str, put: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replaced(name, put)(damaged)
    refused(damaged, good, words, capsys)


# Text that is malformed.


def changed(name: str, **changes: Any) -> Damage:
    """Other values for fields of a JSON document."""

    def damage(trace: Path) -> None:
        path = trace / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def with_line(name: str, line: bytes) -> Damage:
    def damage(trace: Path) -> None:
        with (trace / "peft" / name).open("ab") as file:
            file.write(line + b"\n")

    return damage


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


EVENT = b'{"kind":"event","at":0,"stage":"a","text":"b","facts":{"a":%s}}'
REQUEST = b'{"id":"c","prompt":%s,"adapter":null,"prompt_ids":[1],"output_ids":[1],"text":"","logprobs":[%s]}'
LINES: list[tuple[str, Damage, str]] = [
    ("bytes", with_line("events.jsonl", b'{"kind":"event","at":0,"stage":"\xff","text":""}'), "line 10: "),
    ("a kind", with_line("events.jsonl", b'{"kind":"\\u001b[31m\\n::error::"}'), "Invalid value '\\x1b[31m\\n"),
    ("deep facts", with_line("events.jsonl", EVENT % nested(300)), "line 10: its facts are nested too deeply"),
    ("deeper facts", with_line("events.jsonl", EVENT % nested(90_000)), "line 10: it is nested too deeply"),
    ("brackets", with_line("events.jsonl", EVENT % (b"[" + b"[]," * 2_000_000 + b"[]]")), "more than 2000000 arrays"),
    ("huge", with_line("events.jsonl", EVENT % b"1e999"), "Number out of range"),
    ("a prompt", with_line("requests.jsonl", REQUEST % (b"-1", b"")), "line 3: its prompt number is -1"),
    ("a logprob", with_line("requests.jsonl", REQUEST % (b"0", b"NaN")), "line 3: "),
    ("no prompt", with_line("requests.jsonl", b'{"id":"c"}'), "line 3: Object missing required field `prompt`"),
    ("settings", changed("peft/process.json", settings={"a": json.loads(nested(300))}), "nested too deeply"),
    ("versions", changed("run.json", versions=[]), "Expected `object`, got `array`"),
    ("spec", changed("run.json", spec=1), "Expected `object`, got `int`"),
    ("schema", changed("run.json", schema=SCHEMA + 1), f"has trace schema {SCHEMA + 1}"),
    ("number", lambda trace: (trace / "run.json").write_text("5") and None, "Expected `object`, got `int`"),
]


@pytest.mark.parametrize(("damage", "words"), [pytest.param(*rest, id=name) for name, *rest in LINES])
def test_malformed_text(
    damaged: Path, good: Path, damage: Damage, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(damaged)
    refused(damaged, good, words, capsys)


def test_a_prompt_that_the_run_does_not_have(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_line("requests.jsonl", REQUEST.replace(b"null", b'"a"') % (b"9" * 18, b""))(damaged)
    status, out, _ = call("show", damaged, capsys=capsys)
    assert status == 0
    assert "1 tokens" in out


@pytest.mark.parametrize(("code", "shown"), [("LP999", "LP999"), ("\x1b[31m\nLP1", "\\x1b[31m\\nLP1")])
def test_a_rule_that_only_a_newer_version_has(
    good: Path, tmp_path: Path, code: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = write(tmp_path / "newer.lptrace", code)
    status, out, err = call("show", newer, capsys=capsys)
    assert (status, err) == (1, "")
    assert "1 of 2 modules took effect, 1 lost at read" in out
    assert f"{shown} unknown-rule: upgrade lora-probe to read about this rule" in out
    status, out, err = call("show", newer, "--format", "json", capsys=capsys)
    (diagnostic,) = json.loads(out)["diagnostics"]
    assert (diagnostic["code"], diagnostic["severity"]) == (shown, "error")
    assert "upgrade" in diagnostic["hint"]
    assert call("compare", newer, good, capsys=capsys)[0] == 1


# Whatever else.

FILES = ("run.json", "peft/process.json", "peft/events.jsonl", "peft/requests.jsonl", SEGMENT, SECOND, SCORE)


def judge(trace: Path, good: Path) -> str:
    """Every output for a trace: the error message, or nothing. Any other exception fails."""
    console = Console(file=open(os.devnull, "w"), width=160)  # noqa: PTH123, SIM115
    try:
        found = open_trace(trace)
        console.print(recording(Recording(found)))
        console.print(recording(Recording(found, events=True)))
        for one in found.scores:
            one.logprobs()
        other = open_trace(good)
        for sides in ((found, other), (other, found)):
            console.print(comparison(compare(*sides)))
    except ProbeError as error:
        return error.message
    finally:
        console.file.close()
    return ""


@fuzzed
@given(st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bytes(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Bytes overwritten, removed or inserted, mostly in the structure of the file."""
    name = data.draw(st.sampled_from(FILES))
    content = bytearray((good / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        size = len(content)
        at = data.draw(st.integers(0, min(size, 2500)) | st.integers(0, size))
        what = data.draw(st.sampled_from(["set", "cut", "put", "end"]))
        if what == "set" and at < size:
            content[at] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789-"[]{},eN\\')))
        elif what == "cut":
            del content[at : at + data.draw(st.integers(1, 64))]
        elif what == "put":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=16))
        elif what == "end":
            del content[at:]
    trace = tmp_path / "any.lptrace"
    shutil.copytree(good, trace)
    try:
        (trace / name).write_bytes(content)
        said = judge(trace, good)
        assert not said or said.isprintable()
        assert len(said) < 1000
    finally:
        shutil.rmtree(trace)


def test_rows_of_loads_without_a_record(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log of events is gone, and the rows are there."""
    cut = Path(shutil.copytree(good, tmp_path / "cut.lptrace"))
    (cut / "peft" / "events.jsonl").write_text("")
    for traces in ((cut, good), (good, cut)):
        status, _, error = call("compare", *traces, capsys=capsys)
        assert status in (1, 2)
        assert "Traceback" not in error
