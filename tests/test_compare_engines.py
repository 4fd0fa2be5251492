"""`compare` with engines in place of traces: they are recorded first, on the tokens of the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, call
from written import write_adapter

from lora_probe import compare, open_trace
from lora_probe.errors import EngineFailed

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which the traces are written."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_sides_are_recorded(adapter: Path, llama: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", llama, "--prompt", "hello", "--max-tokens", 3, "--format", "json")
    status, out, error = call("compare", "peft", "peft", adapter, *options, capsys=capsys)
    assert status == 0
    data = json.loads(out)
    assert data["verdict"] == "agree"
    assert data["dtype"] == "float32"
    # The first prompt runs twice, and the runs are scored.
    repeats = [data["repeats"][side] for side in ("reference", "candidate")]
    assert [{kind: found["logprob_error"] for kind, found in of_run.items()} for of_run in repeats] == [
        {"adapter": 0.0, "base": 0.0}
    ] * 2
    assert data["outputs"]["base"]["kl"] == pytest.approx(0, abs=1e-9)
    traces = [here / f"{adapter.name}-peft{number}.lptrace" for number in ("", "-2")]
    assert [data["reference"], data["candidate"]] == [trace.name for trace in traces]
    assert [f"wrote {trace.name}" in error for trace in traces] == [True, True]
    first, second = (open_trace(trace) for trace in traces)
    assert first.run is not None
    assert second.run is not None
    assert first.run.spec.continuation is None
    answers = [request.output_ids[:-1] for request in first.requests if request.adapter is not None]
    assert second.run.spec.continuation == answers


def test_an_engine_against_a_trace(
    adapter: Path, llama: Path, here: Path, peft_trace: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """In either place, and of another adapter."""
    other = write_adapter(here / "other", llama, seed=5)
    for sides in ((peft_trace.path, "peft"), ("peft", peft_trace.path)):
        status, out, _ = call("compare", *sides, other, "--model", llama, capsys=capsys)
        assert status == 1
        assert "the runs loaded different adapters" in out


def test_what_cannot_be_recorded(
    adapter: Path, peft_trace: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = peft_trace.path
    for more in ((adapter,), ("--prompt", "hi"), ("--dtype", "float32"), ("--", "--seed", "1")):
        status, _, error = call("compare", path, path, *more, capsys=capsys)
        assert status == 2
        assert "are traces, so there is nothing to record" in error
    status, _, error = call("compare", path, "peft", adapter, "--prompt", "hi", capsys=capsys)
    assert status == 2
    assert "peft runs the prompts of the trace" in error
    status, _, error = call("compare", "peft", here / "none", adapter, capsys=capsys)
    assert status == 2
    assert "does not exist" in error
    from lora_probe.comparison import sides

    def require(engine: str) -> None:
        if engine == "vllm":
            raise EngineFailed("vllm is not installed")

    monkeypatch.setattr(sides, "require", require)
    status, _, error = call("compare", "peft", "vllm", adapter, capsys=capsys)
    assert status == 2
    assert "vllm is not installed" in error
    assert [found.name for found in here.glob("*.lptrace")] == [path.name]


@pytest.mark.engine
def test_vllm_is_recorded_on_the_tokens_of_peft(
    adapter: Path, llama: Path, peft_trace: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("compare", peft_trace.path, "vllm", adapter, "--model", llama, "--", "--max-num-seqs", "2")
    status, out, _ = call(*command, capsys=capsys)
    assert status == 0, out
    assert f"the traces agree on {3 * LAYERS} modules" in out


def test_from_python(adapter: Path, llama: Path, peft_trace: Any, here: Path) -> None:
    """Paths, an engine, and a tolerance that hides what is small."""
    agreed = compare(peft_trace, "peft", checkpoint=adapter, model=str(llama))
    assert (agreed.verdict, agreed.causes) == ("agree", ())
    assert agreed.outputs.base.kl is None
    double = write_adapter(here / "double", llama, lora_alpha=32)
    differing = compare(peft_trace.path, "peft", checkpoint=double, model=str(llama))
    assert [cause.code for cause in differing.causes] == ["LP625"]
    hidden = compare(*differing.traces, atol=1e6)
    assert {module.status for module in hidden.modules} == {"ok"}
