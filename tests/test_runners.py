"""Which model runner is recorded, if vLLM lacks a name that the probe needs. vLLM is imported, but no engine runs."""

from __future__ import annotations

import os

import pytest

from lora_probe_vllm import runners
from lora_probe_vllm.runners import PIN_V1, Running, pin_v1, supported
from lora_probe_vllm.seams import Seams, vllm_version

pytestmark = pytest.mark.slow


@pytest.fixture
def without_a_name_of_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    monkeypatch.delattr(GPUModelRunner, "prepare_inputs")
    # Names are looked up once.
    monkeypatch.setattr(runners, "seams", Seams())
    monkeypatch.delenv(PIN_V1, raising=False)


def test_both_runners_are_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PIN_V1, raising=False)
    classes, moved = supported()
    assert (set(classes), moved) == ({"V1", "V2"}, [])
    assert pin_v1() is None
    assert PIN_V1 not in os.environ


@pytest.mark.usefixtures("without_a_name_of_v2")
def test_v1_is_pinned_if_a_name_of_v2_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs"
    assert set(supported()[0]) == {"V1"}
    monkeypatch.setenv(PIN_V1, "1")
    assert pin_v1() is None
    monkeypatch.delenv(PIN_V1)
    why = pin_v1()
    monkeypatch.setenv(PIN_V1, os.environ[PIN_V1])
    assert os.environ[PIN_V1] == "0"
    assert why is not None
    assert why.startswith(f"{PIN_V1}=0, as vLLM {vllm_version()} has no `{name}`")


def test_why_steps_are_not_recorded() -> None:
    unknown = Running(None, "some.module.Runner", None)
    assert unknown.why_not(sampling=True) == (
        "the probe does not support the model runner some.module.Runner; "
        "set VLLM_USE_V2_MODEL_RUNNER=0 to use vLLM's V1 runner"
    )
    compiled = Running("V2", "", "compiles its model (mode VLLM_COMPILE)")
    assert compiled.why_not(sampling=True) is None
    assert "set LORA_PROBE_SAMPLE=200" in str(compiled.why_not(sampling=False))
    assert Running("V1", "", None).why_not(sampling=False) is None
