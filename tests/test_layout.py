"""The source tree stays readable: few top-level entries, short files, short functions."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = (ROOT / "lora_probe", ROOT / "plugins" / "vllm" / "lora_probe_vllm")
FILES = [path for package in PACKAGES for path in package.rglob("*.py")]
MOST_ENTRIES, MOST_LINES, MOST_OF_FUNCTION, MEDIAN = 18, 400, 60, 150
ASKED_FOR_BY_PYTHON = {"__main__.py", "py.typed", "__pycache__"}
"""Files that Python and type checkers look for under these names; nobody looks into them for anything else."""


def test_the_listing_is_short() -> None:
    listed = {entry.name for entry in (ROOT / "lora_probe").iterdir()} - ASKED_FOR_BY_PYTHON
    assert len(listed) <= MOST_ENTRIES, sorted(listed)


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MOST_LINES}
    assert statistics.median(lines.values()) < MEDIAN


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_OF_FUNCTION
    }
    assert not long


def test_files_of_rules_hold_their_own_family() -> None:
    """`lp2_names.py` has rules LP2xx and no others."""
    from lora_probe.rules import all_rules

    for rule in all_rules().values():
        family = rule.module.rpartition(".")[2]
        assert family.startswith(rule.code[:3].lower() + "_"), (rule.code, rule.module)
