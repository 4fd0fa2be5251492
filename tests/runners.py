"""The plugin's engine tests on a chosen model runner and a chosen vLLM.

In: a Python interpreter with vLLM in it, and V1 or V2. Out: pytest's outcome. V2 runs on a CPU with Triton's
interpreter and the back end in `v2/`, which is for tests alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
ENGINE_TESTS = tuple(
    f"test_vllm_{name}.py" for name in ("engine", "mixed", "pushed", "compiled", "experts", "pooled", "tokens")
)
"""The files whose engines run on the runner that the environment selects."""
STEPS = (
    "healthy or embedding_is or head_is or shrink or contaminated or half_filled or cache or computed or one_id"
    " or same_labels or matched_by"
)
"""For pytest's `-k`: the tests that read steps, which is where the runners differ."""
RUNNERS = ("V1", "V2")


def environment(runner: str) -> dict[str, str]:
    """The variables for an engine with this runner."""
    if runner == "V1":
        return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS / "v2")}


def engine_tests(
    runner: str, python: str = sys.executable, *more: str, files: Sequence[str] = ENGINE_TESTS
) -> subprocess.CompletedProcess[str]:
    """Run the engine tests in a process of their own."""
    paths = [str(TESTS / name) for name in files]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *paths, *more]
    return subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | environment(runner), capture_output=True, text=True
    )


def counts(output: str) -> dict[str, int]:
    """How many tests passed, failed and so on, from pytest's last line."""
    last = next((line for line in reversed(output.splitlines()) if " in " in line), "")
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|errors|skipped)", last)}
