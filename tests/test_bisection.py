"""`compare --bisect`: the smallest set of modules whose weights change an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call, record_peft
from faults import ATTENTION, FILES
from written import edited

from lora_probe.engines.mixtures import Limited, smallest

MODULES = [f"m{number}" for number in range(252)]


def run(wanted: set[str], most: int = 1000) -> tuple[list[str], bool, Limited]:
    changes = Limited(lambda chosen: wanted <= set(chosen), most)
    modules, minimal = smallest(MODULES, changes)
    return modules, minimal, changes


@pytest.mark.parametrize("wanted", [{"m0"}, {"m251"}, {"m3", "m4"}, {"m0", "m125", "m251"}])
def test_exactly_the_modules_that_are_needed(wanted: set[str]) -> None:
    modules, minimal, changes = run(wanted)
    assert (set(modules), minimal) == (wanted, True)
    assert changes.runs < 150


def test_no_set_is_tried_twice() -> None:
    tried: list[Sequence[str]] = []

    def test(chosen: Sequence[str]) -> bool:
        tried.append(tuple(chosen))
        return {"m1", "m200"} <= set(chosen)

    smallest(MODULES, Limited(test, 1000))
    assert len(tried) == len(set(tried))


def test_the_runs_are_bounded_and_what_is_left_is_said_to_be_so() -> None:
    modules, minimal, changes = run({"m3", "m100"}, 10)
    assert {"m3", "m100"} <= set(modules)
    assert (minimal, changes.runs) == (False, 10)


@pytest.mark.slow
def test_one_module_of_many_changes_the_answer(
    adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All B differ a little, and one has another sign: only that changes a token."""
    healthy = record_peft(adapter, llama, tmp_path / "healthy", prompts=["hello there"], max_tokens=3)

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        little = {n: t * np.float32(1.001) if "lora_B" in n else t for n, t in tensors.items()}
        return FILES["another sign"].tensors(little)

    wrong = edited(adapter, tmp_path / "edited", change)
    candidate = record_peft(wrong, llama, tmp_path / "wrong", prompts=["hello there"], max_tokens=3)
    command = ("compare", healthy.path, candidate.path, "--bisect")
    status, out, error = call(*command, "--format", "json", capsys=capsys)
    assert status == 1, error
    bisection = json.loads(out)["bisection"]
    assert bisection["modules"] == [ATTENTION.format(1, "v_proj")]
    assert (bisection["total"], bisection["minimal"]) == (9, True)
    assert bisection["to"] == bisection["candidate"] != bisection["reference"]
    assert "of at most 200 runs" in error
    _, out, _ = call(*command, capsys=capsys)
    assert f"bisection: this module changes answer token {bisection['token'] + 1} of prompt 1 from" in out


@pytest.mark.slow
def test_what_cannot_be_bisected_is_compared_all_the_same(
    adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["hello there"]
    healthy = record_peft(adapter, llama, tmp_path / "healthy", prompts=prompts, max_tokens=3)
    status, out, _ = call("compare", healthy.path, healthy.path, "--bisect", capsys=capsys)
    assert status == 0
    assert "note: not bisected: both runs answer with the same tokens" in out
    dead = edited(adapter, tmp_path / "dead", FILES["dead names"].tensors)
    lost = record_peft(dead, llama, tmp_path / "lost", prompts=prompts, max_tokens=3)
    status, out, _ = call("compare", lost.path, healthy.path, "--bisect", capsys=capsys)
    assert status == 1
    assert "note: not bisected: modules of the reference were lost: pass the run first in which all took effect" in out
    # What was compared has gone.
    (dead / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    status, out, _ = call("compare", healthy.path, lost.path, "--bisect", capsys=capsys)
    assert status == 1
    assert f"note: not bisected: `{dead}` has changed since" in out
    for option, value in (("--bisect-runs", 9), ("--bisect-engine", "peft")):
        status, _, error = call("compare", healthy.path, lost.path, option, value, capsys=capsys)
        assert status == 2
        assert f"{option} belongs to --bisect" in error
