"""Constructed reports, their folders, and `lora-probe` as a user calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_probe.checking import NotRun, Report
from lora_probe.checking import check as checking
from lora_probe.ledger import OK, STATIONS, Finding, Ledger, Row
from lora_probe.rules import Diagnostic, all_rules
from lora_probe.rules.lp2_weights import not_in_file

MODULES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(30) for p in "qkv"]
LOST = not_in_file()


def ledger(engine: str, hole: bool = False) -> Ledger:
    """A predicted ledger; with `hole`, layer 5 is lost."""

    def row(module: str) -> Row:
        finding = LOST if hole and ".5." in module else OK
        return Row((module, "weight", None), dict.fromkeys(STATIONS[:3], finding))

    return Ledger(engine, tuple(map(row, MODULES)), predicted=True)


def finding(code: str, message: str, **more: Any) -> Diagnostic:
    rule = all_rules()[code]
    facts = {"severity": rule.severity, "hint": rule.hint, "engines": ("peft", "vllm")} | more
    return Diagnostic(code, rule.name, message=message, **facts)


def healthy(folder: Path) -> Report:
    note = "`runs` holds checkpoint-1, checkpoint-2; using the last, checkpoint-2"
    ledgers = {name: ledger(name) for name in ("peft", "vllm")}
    return Report(folder, "base", ledgers, (), (), (note,), vllm="0.32")


def baseless(folder: Path) -> Report:
    """No problems in the files, and a base model that was not found."""
    unknown = Finding("unknown", message="the base model was not found")
    stations = dict(zip(STATIONS[:3], (OK, OK, unknown), strict=True))
    rows = tuple(Row((module, "weight", None), stations) for module in MODULES)
    ledgers = {name: Ledger(name, rows, predicted=True) for name in ("peft", "vllm")}
    return replace(
        healthy(folder), ledgers=ledgers, not_run=(NotRun(("LP301", "LP302"), "the base model was not found"),)
    )


def damaged(folder: Path, message: str = "r=8 in the config, rank 4 in the tensors") -> Report:
    """An error in the weights, a warning in the config's line 12, and a rule that was not run."""
    lost = tuple(module for module in MODULES if ".5." in module)
    sentence = "3 lost at stored: layer 5 q_proj, k_proj, v_proj are not in the file (LP204)"
    where = str(folder / "adapter_model.safetensors")
    found = (
        finding("LP204", sentence, modules=lost, engines=("vllm",), path=where, names_modules=True),
        finding("LP201", message, severity="warning", path=str(folder / "adapter_config.json"), line=12),
    )
    ledgers = {"peft": ledger("peft"), "vllm": ledger("vllm", hole=True)}
    return Report(folder, None, ledgers, found, (NotRun(("LP301",), "no base"),))


def warned(folder: Path) -> Report:
    found = damaged(folder)
    return replace(found, diagnostics=found.diagnostics[1:], not_run=())


def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders with the file names of adapters; the name of each decides what `check` finds."""
    for name in ("damaged", "healthy", "warned", "deep/damaged-2", "deep/healthy-10", "deep/healthy-9"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").touch()
    (tmp_path / "notes").mkdir()
    for name in ("notes/todo.txt", "notes/tokenizer_config.json", "healthy/README.md"):
        (tmp_path / name).touch()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path, target_is_directory=True)

    def check_all(adapters: Sequence[Path], **_: Any) -> Iterator[Report]:
        kinds = {"damaged": damaged, "healthy": healthy, "warned": warned, "baseless": baseless}
        return (kinds[folder.name.partition("-")[0]](folder) for folder in adapters)

    monkeypatch.setattr(checking, "check_all", check_all)
    monkeypatch.chdir(tmp_path)
    return tmp_path
