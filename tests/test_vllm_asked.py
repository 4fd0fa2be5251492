"""`trace --engine server` against a real vLLM server in which nothing of lora-probe is installed, with a key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LAYERS, call
from failures import FAILURES
from safetensors.numpy import load_file, save_file
from server import Server, serving
from written import write_adapter

from lora_probe import open_trace, trace_server
from lora_probe.engines.server.engine import ServerEngine
from lora_probe.errors import EngineFailed
from lora_probe.recording import Outcome, Prompt, RunSpec, Trace

pytestmark = pytest.mark.engine
KEY = "sk-of-the-server"
PROMPTS = ("Who are you?", "What is the capital of France?")


def with_config(adapter: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture(scope="module")
def adapters(adapter: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the server serves, by name. In the folder of `adapter`, lora_alpha is 16 and r is 8."""
    folder = tmp_path_factory.mktemp("asked")
    return {
        "healthy": adapter,
        "dead": FAILURES["C01-text-names"].make(adapter, llama, folder / "dead"),
        "doubled": with_config(adapter, folder / "doubled", lora_alpha=32),
        "rslora": with_config(adapter, folder / "rslora", use_rslora=True),
        "other": write_adapter(folder / "other", llama, seed=7),
    }


@pytest.fixture(scope="module")
def server(llama: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    modules = [f"{name}={path}" for name, path in adapters.items()]
    options = ("--max-loras", "2", "--max-cpu-loras", "8", "--lora-modules", *modules)
    with serving(llama, tmp_path_factory.mktemp("server"), *options, VLLM_PLUGINS="", VLLM_API_KEY=KEY) as server:
        yield server


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def record(server: Server, name: str, folder: Path, checkpoint: Path | None = None, base: Path | None = None) -> Trace:
    """A run in this process, where torch is imported already."""
    path, model = (str(checkpoint), str(base)) if checkpoint is not None else (None, "")
    options = {"url": url(server), "request_timeout": 60.0, "dtype": "auto"}
    spec = RunSpec("server", path, name, model, [Prompt(text) for text in PROMPTS], 8, "events", options)
    ServerEngine().record(spec, folder)
    return open_trace(folder)


def outcome(trace: Trace) -> Outcome:
    return trace.outcomes[0]


def test_without_the_folder_it_states_whether_answers_change(server: Server, tmp_path: Path) -> None:
    healthy = outcome(record(server, "healthy", tmp_path / "healthy"))
    assert healthy.outcome == "changes"
    assert healthy.change > 10 * healthy.noise
    dead = outcome(record(server, "dead", tmp_path / "dead"))
    assert dead.code == "LP608"
    assert "exactly as those for its base `base`" in dead.message


@pytest.mark.parametrize(
    ("name", "expected", "factor"),
    [
        ("healthy", "as trained", 1.0),
        ("doubled", "other scaling", 2.0),
        ("rslora", "other scaling", 8**0.5),
        ("other", "other weights", None),
        ("dead", "as base", 0.0),
    ],
)
def test_with_the_folder_it_states_whether_that_adapter_runs(
    name: str, expected: str, factor: float | None, server: Server, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    trace = record(server, name, tmp_path / "run", adapter, llama)
    verdict = outcome(trace)
    assert verdict.outcome == expected, verdict
    if factor is not None:
        assert verdict.factor == pytest.approx(factor, rel=0.05)
    (_, ledger) = trace.loads[0]
    assert ledger.count("unknown") == 3 * LAYERS
    assert {row.stations["stored"].value for row in ledger.rows} == {"ok"}
    assert {row.stations["applied"].message for row in ledger.rows} == {"the server does not show its layers"}


def test_another_base_than_the_servers(server: Server, adapter: Path, llama: Path, tmp_path: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"lm_head.weight": 40 * tensors["lm_head.weight"]}, other / "model.safetensors")
    assert outcome(record(server, "healthy", tmp_path / "run", adapter, other)).code == "LP611"


def test_names_and_keys_that_are_wrong(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineFailed, match="does not serve `unknown`; it serves `base`, `healthy`"):
        record(server, "unknown", tmp_path / "unknown")
    with pytest.raises(EngineFailed, match="does not state which model is the base of `base`"):
        record(server, "base", tmp_path / "base")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(EngineFailed, match="refuses the key"):
        record(server, "healthy", tmp_path / "wrong")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(EngineFailed, match="asks for a key"):
        record(server, "healthy", tmp_path / "none")


def test_the_command_and_the_function(
    server: Server, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = "trace", adapter, "--engine", "server", "--url", url(server), "--max-tokens", 8, "--adapter"
    status, out, err = call(*asked, "doubled", capsys=capsys)
    assert status == 1
    assert "the server runs `doubled` at 2 times the scaling it was trained with (LP609)" in out
    assert "LP609 served-at-another-scaling: compare lora_alpha" in out
    assert "wrote doubled-server.lptrace" in err
    status, out, _ = call("show", "doubled-server.lptrace", "--format", "json", capsys=capsys)
    shown = json.loads(out)
    assert status == 1
    assert shown["loads"][0]["outcome"]["factor"] == pytest.approx(2, rel=0.05)
    assert [diagnostic["code"] for diagnostic in shown["diagnostics"] if diagnostic["code"] == "LP609"]
    trace = trace_server(url(server), "healthy", prompts="hello there", max_tokens=4, out=tmp_path / "by-function")
    assert trace.healthy
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
