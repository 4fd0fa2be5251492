"""`inspect A B` on pairs whose relation is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapter_pairs import CASES
from written import edited, write_adapter

from lora_probe.adapter import open_adapter
from lora_probe.adapter.diff_verdict import verdict
from lora_probe.adapter.side_by_side import AdapterDiff, side_by_side


def diff_of(first: Path, second: Path) -> AdapterDiff:
    return side_by_side(open_adapter(first), open_adapter(second))


@pytest.mark.parametrize("name", CASES)
def test_a_known_pair(name: str, adapter: Path, tmp_path: Path) -> None:
    case = CASES[name]
    diff = diff_of(adapter, edited(adapter, tmp_path / "second", case.tensors, case.config))
    print(verdict(diff))
    assert verdict(diff).startswith(case.says), verdict(diff)
    assert diff.same == case.same


def test_another_seed(adapter: Path, llama: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", llama, seed=9)
    print(verdict(diff_of(adapter, other)))
    assert verdict(diff_of(adapter, other)).startswith("unrelated: all 9 modules")
