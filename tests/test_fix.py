"""The output of `check --fix` passes `check`, and both real engines apply all of it; the input is not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SharedEngine, record_peft
from failures import FAILURES, as_bin
from test_predictions import LIMIT

from lora_probe import check
from lora_probe.checking.check import fix_for
from lora_probe.checking.renaming import write
from lora_probe.cli.main import main

FIXABLE = (
    "C01-text-names",
    "C01-no-model",
    "C02-other-prefix",
    "C03-orig-mod-outside",
    "C03-orig-mod-inside",
    "C03-ddp",
    "C03-fsdp",
    "C03-checkpointing-in-part",
    "C04-twice-wrapped",
    "C06-no-prefix",
    "C03-base-layer",
    "C14-fused",
    "C14-unknown-word",
    "C14-other-word",
    "adapter-name-in-keys",
    "another-adapter-name-in-keys",
    "saved-without-weight-in-names",
)


@pytest.mark.engine
@pytest.mark.parametrize("name", [*FIXABLE, "bin"])
def test_a_fixed_adapter_takes_effect_in_both_engines(
    name: str, adapter: Path, llama: Path, engine: SharedEngine, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if name == "bin":
        as_bin(adapter, source)
    else:
        FAILURES[name].make(adapter, llama, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main(["check", str(source), "--model", str(llama), "--fix", "-o", str(tmp_path / "fixed")]) == 0
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    report = check(tmp_path / "fixed", model=str(llama), options=LIMIT)
    assert report.diagnostics == ()
    peft = record_peft(tmp_path / "fixed", llama, tmp_path / "peft.lptrace", prompts=("Hi",), max_tokens=1)
    vllm = engine.record(tmp_path / "fixed", tmp_path / "vllm.lptrace", prompts=("Hi",), max_tokens=1)
    assert peft.loads[0][1].healthy
    assert vllm.loads[0][1].healthy


def test_values_and_names_are_as_peft_saved_them(adapter: Path, llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    FAILURES["C01-text-names"].make(adapter, llama, tmp_path / "source")
    write(fix_for(tmp_path / "source", str(llama)), tmp_path / "fixed")
    saved, fixed = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "fixed"))
    assert saved.keys() == fixed.keys()
    assert all((saved[name] == fixed[name]).all() for name in saved)


def test_only_names_from_another_class_need_the_base(adapter: Path, llama: Path, tmp_path: Path) -> None:
    def nameless(folder: Path) -> Path:
        raw = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(raw | {"base_model_name_or_path": None}))
        return folder

    wrapped = nameless(FAILURES["C03-ddp"].make(adapter, llama, tmp_path / "wrapped"))
    assert len(fix_for(wrapped).renamed) == 18
    other = nameless(FAILURES["C01-text-names"].make(adapter, llama, tmp_path / "other"))
    assert not fix_for(other).needed
    assert len(fix_for(other, str(llama)).renamed) == 18


def test_two_tensors_never_get_the_same_name(adapter: Path, llama: Path, tmp_path: Path) -> None:
    folder = FAILURES["twice-with-and-without-prefix"].make(adapter, llama, tmp_path / "a")
    fix = fix_for(folder, str(llama))
    assert not fix.renamed
    assert len(fix.left) == 18


def test_nothing_is_overwritten_or_left_half_done(
    adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FAILURES["C06-no-prefix"].make(adapter, llama, tmp_path / "source")
    (tmp_path / "there").mkdir()
    (tmp_path / "there.partial").mkdir()
    for target in (tmp_path / "there", source / "inside"):
        assert main(["check", str(source), "--fix", "-o", str(target)]) == 2
        assert "-o" in capsys.readouterr().err
    assert not list((tmp_path / "there").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "there", "there.partial"]


def test_the_diff_shows_renames_and_writes_nothing(
    adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = FAILURES["C06-no-prefix"].make(adapter, llama, tmp_path / "source")
    assert main(["check", str(source), "--diff"]) == 0
    out = capsys.readouterr().out
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    assert f"-{name}\n+base_model.model.{name}\n" in out
    assert main(["check", str(source), "--diff", "--format", "json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert data["renamed"][name] == f"base_model.model.{name}"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("options", [["--fix"], ["-o", "x"], ["--fix", "--diff", "-o", "x"], ["--diff", "-o", "x"]])
def test_options_that_cannot_be_combined(options: list[str], adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(adapter), *options]) == 2
    assert "--fix -o FIXED" in capsys.readouterr().err


def test_links_of_a_hub_snapshot_are_followed(
    adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A hub's cache links `snapshots/<commit>/<file>` to `blobs/`. Links out of the repository are not followed."""
    source = FAILURES["C06-no-prefix"].make(adapter, llama, tmp_path / "source")
    snapshot = tmp_path / "models--a" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        (tmp_path / "models--a" / "blobs").mkdir(exist_ok=True)
        path.rename(tmp_path / "models--a" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "secret.txt").symlink_to("/etc/passwd")
    assert main(["check", str(snapshot), "--model", str(llama), "--fix", "-o", str(tmp_path / "fixed")]) == 0
    assert "not copied: secret.txt" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "fixed").iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not any(path.is_symlink() for path in (tmp_path / "fixed").iterdir())
    assert check(tmp_path / "fixed", model=str(llama), options=LIMIT).diagnostics == ()
