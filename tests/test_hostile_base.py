"""Base models that are too large, or contain nonsense: refused before an engine builds them, or stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import call, edited
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_probe.adapter import TrainedAs
from lora_probe.base import open_base
from lora_probe.checking.check import check
from lora_probe.engines.allowed import Allowed, Watched
from lora_probe.engines.child import DESCRIBE, DescribeSpec, run_child
from lora_probe.errors import EngineStopped, ProbeError, TooLarge
from lora_probe.recording import write_json


def base_with(folder: Path, source: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder


HUGE = {
    "num_hidden_layers": 10**9,
    "n_layer": 30_000,
    "num_experts": 10**7,
    "n_routed_experts": 1e12,
    "vocab_size": 10**12,
}


@pytest.mark.parametrize("key", list(HUGE))
def test_no_engine_is_asked_to_build_it(
    key: str, llama: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_with(tmp_path / "base", llama, **{key: HUGE[key]})
    message = f"`{base}/config.json`: `{key}` is "
    with pytest.raises(TooLarge, match="no model has more than"):
        open_base(str(base))
    for arguments in (["check", adapter], ["trace", adapter, "--engine", "peft"], ["parity", adapter]):
        status, out, err = call(*arguments, "--model", base, capsys=capsys)
        assert (status, out) == (2, "")
        assert err.startswith(f"error: {message}")
    named = edited(adapter, tmp_path / "named", config=lambda config: config | {"base_model_name_or_path": str(base)})
    status, out, err = call("check", named, capsys=capsys)
    assert status == 0
    assert message in err
    (not_run,) = json.loads(call("check", named, "--format", "json", capsys=capsys)[1])["not_run"]
    assert "LP303" in not_run["codes"]
    assert "listing the modules" not in err


def test_layers_of_experts_count_together(llama: Path, tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", llama, num_hidden_layers=900, num_experts=900)
    with pytest.raises(TooLarge, match="900 layers of 900 experts, but no model has more than 500,000"):
        open_base(str(base))


def test_sizes_inside_of_other_configs_count(llama: Path, tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", llama, text_config={"more": [{"decoder_layers": 5000}]})
    with pytest.raises(TooLarge, match="`decoder_layers` is 5000"):
        open_base(str(base))


def test_sizes_that_count_nothing_are_let_through(llama: Path, tmp_path: Path) -> None:
    real = {
        "shared_expert_intermediate_size": 20_480,
        "max_window_layers": 70,
        "layer_norm_eps": 1e-5,
        "layer_types": ["full_attention"] * 2000,
        "num_experts": 512,
        "use_layers": True,
        "expert_layer_offset": 10**9,
    }
    assert open_base(str(base_with(tmp_path / "base", llama, **real))).config["num_experts"] == 512


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([5, -1, "x", [5]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = (
    *("architectures", "model_type", "text_config", "quantization_config", "tie_word_embeddings", "_name_or_path"),
    *("num_hidden_layers", "num_kv_shared_layers", "vocab_size", "attention_k_eq_v", "torch_dtype", "auto_map"),
)


@pytest.mark.slow
@settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=4))
def test_any_config_of_a_base(
    changes: dict[str, Any], llama: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Judged from the headers of its files, as if no engine were installed."""
    base = base_with(tmp_path_factory.mktemp("odd") / "base", llama, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_probe.engines.describing.require", _not_installed)
        try:
            report = check(adapter, model=str(base))
        except ProbeError:
            return
    assert set(report.ledgers) == {"peft", "vllm"}


def _not_installed(name: str) -> None:
    raise ProbeError(f"the engine `{name}` is not installed")


@pytest.mark.slow
def test_an_engine_that_takes_too_long_is_stopped(llama: Path, tmp_path: Path) -> None:
    """A real engine: none can describe a base model within a second."""
    folder = tmp_path / "asked"
    folder.mkdir()
    write_json(folder / DESCRIBE, DescribeSpec("peft", str(llama), TrainedAs("CAUSAL_LM")))
    with pytest.raises(EngineStopped, match="the engine's process took more than 1 s while it was in stage `start`"):
        run_child(folder, 0, lambda _: None, Allowed(seconds=1))
    assert not [
        line for line in Path("/proc").glob("[0-9]*/cmdline") if str(folder) in line.read_text(errors="replace")
    ]


@pytest.mark.slow
def test_an_engine_that_is_stopped_is_asked_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_probe.engines import describing as views

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LORA_PROBE_NO_CACHE", raising=False)
    monkeypatch.setattr(views, "ALLOWED", Allowed(seconds=0.5))
    base = open_base(str(llama))
    assert "took more than" in views.views_of(base, ["peft"], TrainedAs()).missing["peft"]
    assert not list((tmp_path / "lora-probe" / "views").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["itself", "what it starts"])
def test_memory_of_an_engine_counts_with_all_that_it_starts(kind: str) -> None:
    take = "kept = b'x' * 300_000_000; import time; time.sleep(60)"
    code = take if kind == "itself" else f"import subprocess, sys; subprocess.run([sys.executable, '-c', {take!r}])"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        watched, why, deadline = Watched(child.pid, Allowed(memory=2**28)), "", time.monotonic() + 30
        while not why and time.monotonic() < deadline:
            why = watched.exceeds(0)
            time.sleep(0.1)
        assert why.startswith("the engine's process used 0.")
        assert why.endswith(" of 0.2 GiB of memory")
    finally:
        os.killpg(child.pid, 9)
        child.wait()


def test_an_engine_that_gets_on_may_take_its_time() -> None:
    watched = Watched(os.getpid(), Allowed(idle=0.3))
    for written in range(10):
        assert watched.exceeds(written) == ""
        time.sleep(0.05)
    time.sleep(0.3)
    assert watched.exceeds(9) == "the engine's process made no progress for 0 s"
