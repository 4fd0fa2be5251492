"""`cost`: the memory of slots against a real engine, the flags that fit, and what a benchmark adds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from saved_benchmarks import save_benchmark, speed
from written import edited, write_adapter, write_base

import lora_probe
from lora_probe.errors import ModelNotFound, ProbeError

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"dtype": "float32", "max_lora_rank": 16, "max_loras": 1}),
    (
        "llama",
        {"dtype": "bfloat16", "max_lora_rank": 8, "max_loras": 3, "lora_target_modules": ["q_proj", "down_proj"]},
    ),
    ("qwen2", {"dtype": "float32", "max_lora_rank": 32, "max_loras": 2}),
    ("moe", {"dtype": "float32", "max_lora_rank": 16, "max_loras": 2}),
]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(SETTINGS)])
def test_slots_are_those_of_a_real_engine(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", kind)
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    script = Path(__file__).with_name("slot_bytes.py")
    command = [sys.executable, str(script), str(base), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    engine = json.loads(done.stdout.splitlines()[-1])
    cost = lora_probe.cost(adapter, model=str(base), options=settings)
    assert sorted(cost.given.slots.names) == engine["layers"]
    assert not cost.given.slots.unknown
    assert cost.given.slot * settings["max_loras"] == engine["bytes"]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.timeout(300)
def test_the_flags_that_fit_serve_the_adapter(tmp_path: Path) -> None:
    """In a real engine with these flags, all its modules take effect."""
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])
    fitting = lora_probe.cost(adapter, model=str(base)).fitting.flags
    assert fitting.targets is not None
    options = {"dtype": "float32", "max_lora_rank": fitting.max_lora_rank, "lora_target_modules": list(fitting.targets)}
    shared: dict[str, Any] = {"model": str(base), "prompts": ["Who are you?"], "max_tokens": 2}
    trace = lora_probe.trace(adapter, engine="vllm", options=options, out=tmp_path / "run.lptrace", **shared)
    assert [ledger.healthy for _, ledger in trace.loads] == [True]


@pytest.fixture
def adapter(llama_files: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", llama_files, target_modules=["q_proj", "k_proj"])


@pytest.fixture
def llama_files(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def test_the_flags_that_fit(adapter: Path, llama_files: Path, capsys: Any) -> None:
    status, out, err = call("cost", adapter, "--model", llama_files, capsys=capsys)
    assert (status, err) == (0, "")
    report = json.loads(call("cost", adapter, "--model", llama_files, "--format", "json", capsys=capsys)[1])
    assert report["flags"] | {"arithmetic": 0} == {
        "max_lora_rank": 16,
        "max_loras": 1,
        "lora_target_modules": None,
        "layers": len(report["layers"]),
        "slot_bytes": report["flags"]["slot_bytes"],
        "slots_bytes": report["flags"]["slot_bytes"],
        "arithmetic": 0,
    }
    fitting = report["fitting"]
    assert (fitting["max_lora_rank"], fitting["lora_target_modules"]) == (8, ["k_proj", "q_proj"])
    # q, k and v are one layer of vLLM.
    assert fitting["layers"] == 3
    assert fitting["slot_bytes"] < report["flags"]["slot_bytes"]
    assert f"use --max-lora-rank {fitting['max_lora_rank']} --max-loras 1 --lora-target-modules k_proj q_proj" in out


def test_with_the_flags_that_fit_nothing_is_left_to_save(adapter: Path, llama_files: Path, capsys: Any) -> None:
    fitting = ("--max-lora-rank", "8", "--lora-target-modules", "k_proj", "q_proj")
    out = call("cost", adapter, "--model", llama_files, *fitting, capsys=capsys)[1]
    assert "less for each slot" not in out
    assert out.splitlines()[0].endswith("--lora-target-modules k_proj q_proj")


def test_flags_that_do_not_fit(adapter: Path, llama_files: Path, capsys: Any) -> None:
    cases = {
        ("--max-lora-rank", "1"): "vLLM refuses rank 8 with --max-lora-rank 1",
        ("--lora-target-modules", "down_proj"): "--lora-target-modules leaves out model.layers.0.self_attn.qkv_proj",
    }
    for flags, words in cases.items():
        status, out, _ = call("cost", adapter, "--model", llama_files, *flags, capsys=capsys)
        assert status == 0
        assert out.startswith("vLLM does not apply all of this adapter with ")
        assert words in out


def test_what_vllm_refuses_or_does_not_adapt(llama_files: Path, tmp_path: Path, capsys: Any) -> None:
    dora = write_adapter(tmp_path / "dora", llama_files, use_dora=True)
    out = call("cost", dora, "--model", llama_files, capsys=capsys)[1]
    assert out.startswith("vLLM refuses this adapter: ")
    assert "less for each slot" not in out

    def elsewhere(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("self_attn.q_proj", "foo.bar"): values for name, values in tensors.items()}

    plain = write_adapter(tmp_path / "plain", llama_files, target_modules=["q_proj"])
    status, _, err = call("cost", edited(plain, tmp_path / "none", elsewhere), "--model", llama_files, capsys=capsys)
    assert (status, "vLLM adapts no module of" in err) == (2, True)


def test_the_base_has_a_dtype_of_its_own(adapter: Path, llama_files: Path) -> None:
    def weights(**options: str) -> int:
        return lora_probe.cost(adapter, model=str(llama_files), options=options).weights

    assert weights(dtype="float32") == weights(dtype="float32", lora_dtype="bfloat16") == 2 * weights()


def test_a_benchmark_of_another_adapter_is_named(adapter: Path, llama_files: Path, tmp_path: Path, capsys: Any) -> None:
    modes = [speed("with the adapter", "no LoRA", [0.5, 0.52, 0.51], adapter="/other", model="/m")]
    saved = save_benchmark(tmp_path / "BENCH.json", modes)
    out = call("cost", adapter, "--model", llama_files, "--benchmark", saved, capsys=capsys)[1]
    assert "measured (with /other on /m), tokens per second" in out
    assert "to measure it: pytest benchmarks/" in out


def test_memory_grows_with_the_slots_and_the_dtype(adapter: Path, llama_files: Path) -> None:
    def slots(**options: Any) -> int:
        cost = lora_probe.cost(adapter, model=str(llama_files), options=options)
        return cost.given.slot * cost.given.flags.max_loras

    assert slots(max_loras=4) == 4 * slots()
    assert slots(dtype="float32") == 2 * slots(dtype="bfloat16") == 2 * slots()
    assert slots(dtype="float32", lora_dtype="bfloat16") == slots()
    assert slots(max_lora_rank=64) == 4 * slots()


def test_what_was_measured_is_beside_it(adapter: Path, llama_files: Path, tmp_path: Path, capsys: Any) -> None:
    modes = [
        speed("with the adapter", "no LoRA", [0.5, 0.52, 0.51], adapter=str(adapter)),
        speed("merged model", "with the adapter", [1.9, 2.0, 1.95], adapter=str(adapter)),
    ]
    saved = save_benchmark(tmp_path / "BENCH.json", modes)
    words = ("cost", adapter, "--model", llama_files, "--benchmark", saved)
    out = call(*words, capsys=capsys)[1]
    assert "measured, tokens per second: with the adapter 0.51 (0.50-0.52) of no LoRA" in out
    assert "measured, tokens per second: merged model 1.95 (1.90-2.00) of with the adapter" in out
    assert "Measured with this adapter" in out
    assert "pytest benchmarks/" not in out
    html = call(*words, "--format", "html", capsys=capsys)[1]
    assert "Measured with this adapter" in html
    report = json.loads(call(*words, "--format", "json", capsys=capsys)[1])
    assert [of["mode"] for of in report["measured"]] == ["with the adapter", "merged model"]


def test_what_cannot_be_served(adapter: Path, llama_files: Path, tmp_path: Path, capsys: Any) -> None:
    status, _, err = call("cost", adapter, "--model", tmp_path / "nowhere", capsys=capsys)
    assert status == 2
    assert "error: " in err
    huge = write_adapter(tmp_path / "huge", llama_files, r=600)
    with pytest.raises(ProbeError, match="rank 600, more than vLLM's largest --max-lora-rank, 512"):
        lora_probe.cost(huge, model=str(llama_files))
    for flags, words in (
        (("--max-lora-rank", "9"), "does not accept --max-lora-rank 9"),
        (("--max-loras", "-3"), "--max-loras is -3"),
    ):
        status, _, err = call("cost", adapter, "--model", llama_files, *flags, capsys=capsys)
        assert (status, words in err) == (2, True)


def test_without_the_base_model(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "no/such-model"}))
    with pytest.raises(ModelNotFound, match="was not found"):
        lora_probe.cost(adapter)
