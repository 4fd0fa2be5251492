"""The engine tests that read steps once more, on vLLM's V2 model runner, which GPUs use by default. `make matrix` runs
all of them on both."""

from __future__ import annotations

import sys

import pytest
from runners import STEPS, counts, engine_tests

pytestmark = [pytest.mark.engine, pytest.mark.wide]


def test_steps_on_the_v2_runner() -> None:
    run = engine_tests("V2", sys.executable, "-k", f"({STEPS}) and not pushed and not compiled")
    assert run.returncode == 0, run.stdout[-8000:]
    outcome = counts(run.stdout)
    assert outcome["passed"] >= 10
    assert set(outcome) == {"passed"}


def test_two_ranks_on_the_v2_runner() -> None:
    """Sharded, and fully sharded."""
    run = engine_tests("V2", sys.executable, "-k", "two_tensor_parallel", files=("test_vllm_processes.py",))
    assert run.returncode == 0, run.stdout[-8000:]
    assert counts(run.stdout) == {"passed": 2}
