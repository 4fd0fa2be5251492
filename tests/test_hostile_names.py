"""Names and values from files in the output: none begins a line, moves the cursor or is a workflow command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import call, edited

from lora_probe.render.cells import LONGEST, one_line
from lora_probe.render.console import as_json

ORDERS = (
    "\n::error::mine",
    "\r\n::stop-commands::x",
    " ##[error]mine",
    "\x1b]52;c;bWluZQ==\x07",
    "\x9b2J",
    "\u202eenim\u2066",
    "\u061c\u2028::warning::\u2029",
    "\x00\x7f\x85",
    ":::error:::",
)
EVIL = "".join(ORDERS)
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def require_clean(text: str, *, ours: str = "") -> None:
    """No line is a workflow command, except those that begin with `ours`; nothing moves the cursor."""
    assert not FORBIDDEN.search(text), repr(FORBIDDEN.search(text))
    assert "##[" not in text
    for line in text.split("\n"):
        if not (ours and line.startswith(ours)):
            # A runner passes over the blanks before an order.
            assert not line.lstrip().startswith("::"), line


def texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


@pytest.fixture
def evil(adapter: Path, tmp_path: Path) -> Path:
    """An adapter whose folder, files, tensors, keys and values all contain workflow commands."""
    name = "layers.0.self_attn." + EVIL.replace(".", "") + ".q_proj"

    def tensors(held: dict[str, Any]) -> dict[str, Any]:
        renamed = {old.replace("layers.0.self_attn.q_proj", name): value for old, value in held.items()}
        return renamed | {EVIL: next(iter(held.values()))}

    changes = {
        "base_model_name_or_path": EVIL,
        "peft_version": EVIL,
        "task_type": EVIL,
        "init_lora_weights": EVIL,
        "bias": EVIL,
        "rank_pattern": {EVIL.replace("[", ""): 8},
        "modules_to_save": ["x" + EVIL.replace("[", "")],
        EVIL: EVIL,
        "use_" + EVIL: EVIL,
    }
    folder = edited(adapter, tmp_path / "plain", tensors, lambda config: config | changes)
    named = tmp_path / EVIL.replace("\x00", "").replace("/", "")
    shutil.move(folder, named)
    (named / ("file" + named.name)).write_text("x")
    path = named / "adapter_config.json"
    # A key that stands twice is shown as well.
    path.write_text(path.read_text().replace("{", '{"peft_version": "1", ', 1))
    return named


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "--norms"],
        ["inspect", "--module", "layers.1.self_attn.q_proj"],
        ["inspect", "--module", EVIL.replace("\x00", "")],
        ["inspect", "--format", "json"],
        ["check"],
        ["check", "--format", "json"],
        ["check", "--format", "sarif"],
        ["check", "--format", "github"],
        ["check", "--diff"],
        ["check", "--diff", "--format", "json"],
        ["check", "--recursive"],
        ["check", "--select", EVIL.replace("\x00", "")],
        ["trace", "--engine", "peft"],
        ["trace", "--engine", EVIL.replace("\x00", "")],
        ["parity", "--merged", EVIL.replace("\x00", ""), "--weights-only"],
    ],
    ids=lambda arguments: " ".join(arguments)[:30].encode("ascii", "replace").decode().replace("\n", ""),
)
def test_names_and_values_are_no_orders(
    arguments: list[str], evil: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(evil.parent)
    status, out, err = call(arguments[0], evil.name, *arguments[1:], capsys=capsys)
    assert status in (0, 1, 2)
    assert out or err
    ours = "::" if "github" in arguments else ""
    require_clean(out + err, ours=ours)
    if ours:
        assert all(re.match(r"::(error|warning|notice) (file|title)=", line) for line in out.splitlines())
    if "json" in arguments:
        # Escapes change no value.
        assert any(EVIL in text for text in texts(json.loads(out)))


@pytest.mark.slow
@pytest.mark.parametrize("width", [20, 79, 160])
def test_no_fold_of_a_table_makes_an_order(width: int, adapter: Path, tmp_path: Path) -> None:
    """A long name may wrap at any column; the rest is indented, and a runner skips leading blanks."""
    name = "".join(f"{'x' * number}::error::" for number in range(40))
    odd = edited(
        adapter,
        tmp_path / "odd",
        lambda tensors: {old.replace("q_proj", name): value for old, value in tensors.items()},
        lambda config: config | {"base_model_name_or_path": None},
    )
    for arguments in (["inspect", str(odd)], ["inspect", str(odd), "--norms"], ["check", str(odd)]):
        run = subprocess.run(
            [sys.executable, "-m", "lora_probe", *arguments],
            env={"PATH": "/usr/bin", "COLUMNS": str(width), "HOME": str(tmp_path), "LORA_PROBE_NO_CACHE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stdout
        require_clean(run.stdout + run.stderr)


@pytest.mark.slow
def test_a_value_of_two_megabytes_is_not_printed(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = ("task_type", "init_lora_weights", "bias", "base_model_name_or_path", "peft_version", "lora_dropout")
    for field in fields:
        large = edited(adapter, tmp_path / field, config=lambda config, key=field: config | {key: "x" * 2_000_000})
        for arguments in (["check", large], ["inspect", large], ["check", large, "--format", "github"]):
            _, out, err = call(*arguments, capsys=capsys)
            assert len(out) + len(err) < 30_000, (field, arguments)


def test_a_name_is_no_emoji_and_no_option(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:bug:b", "-oX"):
        shutil.copytree(adapter, name)
        status, out, err = call("inspect", "--", name, capsys=capsys)
        assert status == 0
        assert name in out
        assert f"{name} --norms" in err
    status, out, _ = call("check", "--", "-oX/adapter_config.json", "a:bug:b", capsys=capsys)
    assert status == 0
    assert "2 adapters" in out


def test_one_line() -> None:
    assert one_line("a\tb\nc") == "a b\ufffdc"
    assert one_line(":::") == ": : :"
    assert one_line("x ##[group]") == "x ## [group]"
    assert one_line("http://x:1, layers.0") == "http://x:1, layers.0"
    assert one_line("你是谁? ‖ΔW‖") == "你是谁? ‖ΔW‖"
    long = one_line("x" * (LONGEST + 5))
    assert long == "x" * LONGEST + "... (5 more characters)"


def test_json_holds_every_value_in_printable_characters() -> None:
    value = {"a": EVIL, "b": "你是谁? ‖ΔW‖ \U0001f600", "c": ["\ud800", "\U000e0041"], EVIL: 1.5}
    text = as_json(value)
    assert json.loads(text) == value
    assert "你是谁? ‖ΔW‖ \U0001f600" in text
    assert all(character.isprintable() for character in text.replace("\n", ""))
    assert "##[" not in text
