"""`show --bundle`: what a bug report holds, and what it does not."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from served import A, B, mixed
from test_compare_runs import record

from lora_probe.render.bundle import _without_secret_flags

SECRETS = ("sk-12345", "my prompt", "I am Nova")


def test_a_bundle_has_no_prompts_and_no_secrets(tmp_path: Path, capsys: Any) -> None:
    texts = {"forced_text": "I am Nova", "generated_text": "I am Nova"}
    folder = record(tmp_path / "run", forced=1, texts=texts)
    run = json.loads((folder / "run.json").read_text())
    run["spec"]["prompts"] = [{"text": "my prompt", "ids": [1, 2]}]
    run["spec"]["engine_args"] = ["--api-key", "sk-12345", "--hf-token=sk-12345", "--seed", "3"]
    run["spec"]["options"] = {"dtype": "float32", "api_key": "sk-12345"}
    (folder / "run.json").write_text(json.dumps(run))
    target = tmp_path / "bug.zip"
    _, out, error = call("show", folder, "--bundle", target, capsys=capsys)
    assert out == ""
    assert f"wrote {target}" in error
    with zipfile.ZipFile(target) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {"README.txt", "report.md", "environment.json", "run.json", "ledger.json"} <= set(files)
    for name, text in files.items():
        assert not any(secret in text for secret in SECRETS), name
    spec = json.loads(files["run.json"])["spec"]
    assert spec["prompts"] == 1
    assert spec["engine_args"] == ["--api-key", "removed", "--hf-token=removed", "--seed", "3"]


def test_the_bundle_of_a_server(tmp_path: Path, capsys: Any) -> None:
    folder = mixed(tmp_path / "run", A, B)
    target = tmp_path / "bug.zip"
    status, _, _ = call("show", folder, "--bundle", target, capsys=capsys)
    assert status == 0
    with zipfile.ZipFile(target) as archive:
        names = archive.namelist()
        ledger = json.loads(archive.read("ledger.json"))
        assert "/adapters/A" in archive.read("adapters/load-0/unreadable.txt").decode()
    assert "processes/vllm-rank-0.events.jsonl" in names
    assert [load["headline"] for load in ledger["loads"]] == [
        "4 of 4 modules took effect",
        "2 of 2 modules took effect",
    ]
    status, _, error = call("show", folder, "--bundle", target, capsys=capsys)
    assert status == 2
    assert f"`{target}` already exists" in error


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--max-num-batched-tokens", "8"], ["--max-num-batched-tokens", "8"]),
        (["--hf-token", "x"], ["--hf-token", "removed"]),
        (["--tokenizer", "org/x"], ["--tokenizer", "org/x"]),
        (["--api-key", "one", "two", "--seed", "1"], ["--api-key", "removed", "removed", "--seed", "1"]),
        (['--additional-config={"api_key": "x"}'], ['--additional-config={"api_key": "removed"}']),
        (
            ["--extra", '{"a": {"aws_secret_access_key": ["x"]}}'],
            ["--extra", '{"a": {"aws_secret_access_key": "removed"}}'],
        ),
    ],
)
def test_flags(words: list[str], kept: list[str]) -> None:
    assert _without_secret_flags(words) == kept
