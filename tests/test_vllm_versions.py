"""The versions of vLLM are in one place in the core and one in the plugin, and both agree. No torch, no vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_probe.errors import ProbeError
from lora_probe.rules import all_rules, vllm_versions
from lora_probe.rules.vllm_versions import TABLE, behaviour
from lora_probe_vllm import seams

ROOT = Path(__file__).resolve().parent.parent


def test_core_and_plugin_know_the_same_versions() -> None:
    assert tuple(row.version for row in TABLE) == seams.SUPPORTED
    assert f"{seams.SUPPORTED[0]} to {seams.SUPPORTED[-1]}" == vllm_versions.SUPPORTED


def test_pages_name_the_versions_of_the_table() -> None:
    pages = [rule.page for rule in all_rules().values()]
    assert any(f"({vllm_versions.SUPPORTED})" in page for page in pages)
    assert not any("{vllm}" in page for page in pages)


def test_no_source_writes_the_range_by_hand() -> None:
    sources = [*(ROOT / "lora_probe").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    assert len(sources) > 100
    assert [path.name for path in sources if re.search(r"0\.\d+\s+to\s+0\.\d+", path.read_text())] == []


@pytest.mark.parametrize(
    ("wanted", "row"),
    [
        ("0.30", "0.30"),
        ("v0.31.2", "0.31"),
        ("0.32.0+cpu", "0.32"),
        ("0.99", TABLE[-1].version),
        ("1.0", TABLE[-1].version),
    ],
)
def test_a_version_finds_its_row(wanted: str, row: str) -> None:
    assert behaviour(wanted).version == row


def test_versions_are_compared_as_numbers() -> None:
    row = behaviour("0.31")
    assert [row.at_least(first) for first in ("", "0.0", "0.9", "0.31", "0.32", "1.0")] == [
        *(False, True, True, True),
        *(False, False),
    ]
    with pytest.raises(ProbeError, match="older"):
        behaviour("0.9")
