"""Commands in an untrusted folder: no code of the folder, of an adapter or of a model is imported."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import heed_interrupts

from lora_probe.files import isolation

MODULES = (
    "lora_probe",
    "lora_probe_vllm",
    "transformers",
    "peft",
    "torch",
    "vllm",
    "msgspec",
    "numpy",
    "sitecustomize",
)
COMMAND = Path(sys.executable).parent / "lora-probe"


@pytest.fixture
def checkout(llama: Path, adapter: Path, tmp_path: Path) -> Path:
    """A repository with a base model that contains code, an adapter that names it, and a module for every import."""
    shutil.copytree(llama, tmp_path / "pr" / "base")
    shutil.copytree(adapter, tmp_path / "pr" / "a")
    path = tmp_path / "pr" / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "base"}))
    mine = f"open({str(tmp_path / 'MARK')!r}, 'a').write(__name__ + ' ')\n"
    for folder in (tmp_path / "pr", tmp_path / "pr" / "a", tmp_path / "pr" / "base"):
        for name in MODULES:
            (folder / f"{name}.py").write_text(mine)
    for folder in (tmp_path / "pr", tmp_path / "pr" / "base"):
        (folder / "evil.py").write_text(mine + "def register(): pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        remote(tmp_path / "pr" / "base", name)
    installed = tmp_path / "pr" / "evil-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    ours = ("lora_probe.engines", "lora_probe.predictors", "lora_probe.rules")
    groups = ("vllm.general_plugins", "vllm.platform_plugins", *ours)
    (installed / "entry_points.txt").write_text("".join(f"[{group}]\nevil = evil:register\n" for group in groups))
    return tmp_path / "pr"


def remote(base: Path, name: str, **changes: str) -> None:
    """Code in the folder for everything that transformers builds."""
    path = base / name
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    code = {"auto_map": dict.fromkeys(names, "evil.E") | {"AutoTokenizer": ["evil.E", "evil.E"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | code | changes))


def call(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`lora-probe` as a user calls it in that folder, with an empty cache. Nothing may have been executed."""
    variables = {"XDG_CACHE_HOME": str(checkout.parent / "cache"), "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        [str(COMMAND), *arguments],
        cwd=checkout,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    mark = checkout.parent / "MARK"
    assert not mark.exists(), mark.read_text()
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.engine
def test_check_in_a_strangers_folder(checkout: Path) -> None:
    done = call(checkout, "check", "a")
    assert done.returncode == 0, done.stderr
    assert "peft, vllm  9 of 9 modules take effect" in done.stdout
    assert "evil" not in done.stdout + done.stderr


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["peft", "vllm"])
def test_trace_show_and_compare_in_a_strangers_folder(engine: str, checkout: Path) -> None:
    done = call(checkout, "trace", "a", "--engine", engine, "--prompt", "hi", "--max-tokens", "2", "-o", "r.lptrace")
    assert done.returncode == 0, done.stderr
    assert "9 of 9 modules took effect" in done.stdout
    for name in MODULES:
        shutil.copy(checkout / f"{name}.py", checkout / "r.lptrace")
    assert call(checkout, "show", "r.lptrace").returncode == 0
    assert call(checkout, "compare", "r.lptrace", "r.lptrace").returncode == 0


@pytest.mark.slow
def test_parity_and_inspect_in_a_strangers_folder(checkout: Path) -> None:
    done = call(checkout, "parity", "a", "--prompt", "hi", "--max-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert "verified" in done.stdout
    assert call(checkout, "inspect", "a", "--norms").returncode == 0


@pytest.mark.engine
def test_interrupting_a_check_leaves_nothing(checkout: Path) -> None:
    """Ctrl-C in a terminal reaches every process of the group, while both engines describe a base model."""
    temporary = checkout.parent / "tmp"
    temporary.mkdir()
    run = subprocess.Popen(
        [str(COMMAND), "check", "a"],
        cwd=checkout,
        env=os.environ | {"LORA_PROBE_NO_CACHE": "1", "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 60
    while not list(temporary.glob("*/*/engine.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    begin = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert (run.returncode, out, err) == (130, "", "error: interrupted\n")
    assert time.monotonic() - begin < 12
    assert list(temporary.iterdir()) == []
    assert not [line for line in Path("/proc").glob("[0-9]*/cmdline") if str(temporary) in line.read_text("latin-1")]


@pytest.mark.engine
def test_a_base_of_an_unknown_kind_brings_no_code(checkout: Path) -> None:
    """There is no prompt whether the code may run, because nobody could answer it."""
    remote(checkout / "base", "config.json", model_type="evil")
    assert "peft did not describe the base (transformers cannot build" in call(checkout, "check", "a").stderr
    done = call(checkout, "trace", "a", "--engine", "peft", "--prompt", "hi", "--max-tokens", "2", "-o", "r.lptrace")
    assert done.returncode == 2
    assert "Do you wish to run the custom code" not in (checkout / "r.lptrace" / "engine.log").read_text()


def test_a_module_that_an_adapter_names_is_not_imported(checkout: Path) -> None:
    """PEFT before 0.19 imports whatever `megatron_core` names."""
    path = checkout / "a" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"megatron_config": {"x": 1}, "megatron_core": "evil"}
    path.write_text(json.dumps(config))
    for arguments in (["trace", "a", "--engine", "peft"], ["parity", "a"]):
        done = call(checkout, *arguments)
        assert done.returncode == 2
        assert "names the module `evil` in `megatron_core`" in done.stderr


def test_reading_uses_no_network(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a base model that is not found."""
    import socket

    from conftest import edited

    from lora_probe.cli.main import main

    def refuse(*_: object) -> None:
        (tmp_path / "connected").touch()
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    named = edited(adapter, tmp_path / "a", config=lambda config: config | {"base_model_name_or_path": "org/name"})
    for arguments in (["check", str(named)], ["inspect", str(named), "--norms"]):
        assert main(arguments) == 0
    assert main(["trace", str(named), "--engine", "peft", "--model", "./org/name"]) == 2
    assert not (tmp_path / "connected").exists()


def test_the_environment_of_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "PYTHONPATH": os.pathsep.join(["", "src", str(tmp_path), "/opt/ours"]),
        "HF_HOME": "hub",
        "XDG_CACHE_HOME": "/var/cache",
        "OTHER": "kept",
    }
    assert isolation.environment(given) == {
        "PYTHONPATH": "/opt/ours",
        "HF_HOME": str(tmp_path / "hub"),
        "XDG_CACHE_HOME": "/var/cache",
        "OTHER": "kept",
        "PYTHONSAFEPATH": "1",
    }
    assert "PYTHONPATH" not in isolation.environment({"PYTHONPATH": "."})


def test_paths_among_engine_flags_mean_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok").mkdir()
    (tmp_path / "float16").touch()
    flags = ["--tokenizer", "./tok", "--chat-template=./tok", "--dtype", "float16", "--revision", "a/b", "x" * 5000]
    flags += ["--download-dir", "../not-yet"]
    there = str(tmp_path / "tok")
    assert isolation.absolute_flags(flags) == [
        *("--tokenizer", there, f"--chat-template={there}", "--dtype", "float16", "--revision", "a/b", "x" * 5000),
        *("--download-dir", str(tmp_path / "../not-yet")),
    ]
