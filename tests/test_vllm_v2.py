"""The engine tests once more, on vLLM's V2 model runner, which GPUs use by default."""

from __future__ import annotations

import pytest
from runners import counts, engine_tests

pytestmark = pytest.mark.engine


def test_the_engine_tests_pass_on_the_v2_runner() -> None:
    run = engine_tests("V2")
    assert run.returncode == 0, run.stdout[-8000:]
    outcome = counts(run.stdout)
    assert outcome["passed"] > 20
    assert set(outcome) == {"passed"}
