"""Pairs of healthy runs: `compare` finds no difference in any of them, in either direction.

PEFT against vLLM, vLLM against itself, and PEFT in two dtypes: Llama in float32, and Qwen2 in bfloat16 with prompts in
chunks and from the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import SharedEngine, record_peft, start_engine
from written import write_adapter

from lora_probe import compare
from lora_probe.recording import Trace

pytestmark = pytest.mark.engine

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1},
    "rank 16": {"r": 16, "lora_alpha": 24},
    "rsLoRA": {"use_rslora": True},
    "one projection": {"target_modules": ["q_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "an odd scaling": {"lora_alpha": 7, "r": 4},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    "a strong adapter": {"trained": 0.5},
    "a weak adapter": {"trained": 1e-4},
    "some layers": {"layers_to_transform": [0, 2]},
    "outputs of attention and MLP": {"target_modules": ["o_proj", "down_proj"]},
    "gate and up": {"target_modules": ["gate_proj", "up_proj"]},
    "another seed": {"seed": 7},
}
LONG = "a prompt that is longer than one chunk of the prefill: " * 2
PROMPTS = ["hi", LONG, LONG]
"""The last one comes from the prefix cache."""


class Serving(NamedTuple):
    engine: SharedEngine
    base: Path
    dtype: str


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen2", marks=pytest.mark.wide)])
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    base = request.getfixturevalue(request.param)
    if request.param == "llama":
        yield Serving(request.getfixturevalue("engine"), base, "float32")
        return
    settings = {"enable_prefix_caching": True, "max_num_batched_tokens": 32}
    folder = tmp_path_factory.mktemp("chunks") / "first.lptrace"
    yield Serving(start_engine(base, folder, dtype="bfloat16", **settings), base, "bfloat16")


def agree(one: Trace, two: Trace) -> None:
    for traces in ((one, two), (two, one)):
        comparison = compare(*traces)
        assert comparison.causes == ()
        assert comparison.verdict == "agree"
        assert comparison.rows > 0


@pytest.mark.parametrize("name", ADAPTERS)
def test_healthy_runs_agree(name: str, serving: Serving, tmp_path: Path) -> None:
    """Three pairs: PEFT and vLLM, vLLM twice, and PEFT in another dtype."""
    engine, base, dtype = serving
    adapter = write_adapter(tmp_path / "adapter", base, **ADAPTERS[name])
    asked: dict[str, Any] = {"prompts": PROMPTS, "max_tokens": 4}
    in_peft, in_other = (
        record_peft(adapter, base, tmp_path / kind, options={"dtype": kind, "lora_dtype": kind}, **asked)
        for kind in (dtype, {"float32": "bfloat16", "bfloat16": "float32"}[dtype])
    )
    in_vllm, again = (engine.record(adapter, tmp_path / run, **asked) for run in ("vllm", "again"))
    agree(in_peft, in_vllm)
    agree(in_vllm, again)
    agree(in_other, in_vllm)
