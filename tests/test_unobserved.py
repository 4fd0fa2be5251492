"""Rows of steps that no Python sees: how many, and whether vLLM's table sent them to the slot of their adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_probe_vllm.unobserved import Unobserved

pytestmark = pytest.mark.slow

A, B = 7, 8


def add(counts: Unobserved, table: list[int], loads: dict[int, tuple[int, int]]) -> None:
    """A prompt of three tokens for A, one of the base, and a token of B."""
    lora, rows = np.array([A, 0, B]), np.array([3, 2, 1])
    counts.add(lora, rows, loads, torch.tensor(table))


def test_rows_by_load() -> None:
    counts = Unobserved(compiled=True)
    loads = {A: (0, 1), B: (1, 0)}
    add(counts, [1, 1, 1, -1, -1, 0], loads)
    add(counts, [1, 1, 1, -1, -1, 0], loads)
    passed = counts.take()
    assert {load: (of_load.rows, of_load.wrong) for load, of_load in passed.items()} == {0: (6, 0), 1: (2, 0)}
    assert passed[0].text.startswith("6 rows ran in captured graphs or compiled code and were not observed; their")
    assert counts.take() == {}


def test_rows_in_another_slot() -> None:
    counts = Unobserved(compiled=True)
    add(counts, [1, 0, -1, -1, -1, 0], {A: (0, 1), B: (1, 0)})
    passed = counts.take()
    assert (passed[0].wrong, passed[1].wrong) == (2, 0)
    assert passed[0].text.endswith("2 of them were mapped to another slot")


def test_a_slot_that_another_load_gets_counts_for_each() -> None:
    counts = Unobserved(compiled=True)
    add(counts, [0, 0, 0, -1, -1, 0], {A: (0, 1), B: (1, 0)})
    # B has left, and A is loaded again, into the slot of B.
    add(counts, [0, 0, 0, -1, -1, -1], {A: (2, 0)})
    passed = counts.take()
    assert {load: (of_load.rows, of_load.wrong) for load, of_load in passed.items()} == {
        0: (3, 3),
        1: (1, 0),
        2: (3, 0),
    }


def test_a_step_without_a_recorded_adapter() -> None:
    counts = Unobserved(compiled=True)
    counts.add(np.array([0, 9]), np.array([2, 2]), {A: (0, 1)}, torch.tensor([-1, -1, 0, 0]))
    assert counts.take() == {}
