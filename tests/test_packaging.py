"""Both distributions as installed: what they contain, what they require, and what works without the rest."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
from answering import answering, server

ROOT = Path(__file__).parent.parent
CORE = (
    *("msgspec", "numpy", "regex", "rich", "rich-argparse", "safetensors", "markdown-it-py", "mdurl", "pygments"),
    *("httpx", "httpcore", "anyio", "certifi", "idna", "h11", "typing_extensions"),
    *("jinja2", "markupsafe", "shtab"),
)


def build(source: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(source)]
    subprocess.run([*command, "-w", str(target)], check=True, capture_output=True)
    (wheel,) = target.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_wheels_hold_their_package_and_nothing_else(tmp_path: Path) -> None:
    for source, package in ((ROOT, "lora_probe"), (ROOT / "plugins" / "vllm", "lora_probe_vllm")):
        wheel = build(source, tmp_path / package)
        names = zipfile.ZipFile(wheel).namelist()
        assert {name.partition("/")[0].partition("-")[0] for name in names} == {package}
        assert f"{package}/py.typed" in names
        modules = {str(path.relative_to(source)) for path in (source / package).rglob("*.py")}
        assert modules <= set(names)


def test_nothing_of_ours_requires_vllm() -> None:
    for name in ("lora-probe", "lora-probe-vllm"):
        assert not [line for line in requires(name) or [] if line.startswith("vllm")]
    assert version("lora-probe") == version("lora-probe-vllm")


def test_entry_points() -> None:
    engines = {point.name: point.value for point in entry_points(group="lora_probe.engines")}
    assert engines == {
        "peft": "lora_probe.engines.peft.engine:PeftEngine",
        "server": "lora_probe.engines.server.engine:ServerEngine",
        "vllm": "lora_probe_vllm.engine:VllmEngine",
    }
    predictors = {point.name: point.value for point in entry_points(group="lora_probe.predictors")}
    assert predictors == {name: f"lora_probe.prediction.{name}:PREDICTOR" for name in ("peft", "vllm")}
    plugins = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert plugins["lora_probe"] == "lora_probe_vllm:register"


def test_the_core_alone_inspects_and_shows(adapter: Path, peft_trace: object, tmp_path: Path) -> None:
    """A fresh environment with the core's own dependencies: no torch, no peft, no vllm, no plugin."""
    wheel = build(ROOT, tmp_path / "wheel")
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pinned = [f"{name}=={version(name)}" for name in CORE]
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *pinned, str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    checked = subprocess.run([str(python), "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    probe = environment / "bin" / "lora-probe"
    trace = peft_trace.path  # type: ignore[attr-defined]

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(probe), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert "rank 8, alpha 16" in call("inspect", adapter, "--norms").stdout
    checked = call("check", adapter)
    assert checked.returncode == 0, checked.stdout
    assert "peft, vllm  9 of 9 modules take effect" in checked.stdout
    assert "peft did not describe the base" in checked.stderr
    assert "9 of 9 modules took effect" in call("show", trace).stdout
    assert call("compare", trace, trace).returncode == 0
    for engine, word in (("peft", "needs the module"), ("vllm", "is not installed")):
        run = call("trace", adapter, "--engine", engine)
        assert run.returncode == 2
        assert word in run.stderr
        assert "pip install" in run.stderr
    assert list(tmp_path.glob("*.lptrace")) == [trace]
    with answering(server) as asked:
        run = call("trace", "--engine", "server", "--url", asked.url, "--adapter", "mine")
    assert run.returncode == 0, run.stderr
    assert "adapter `mine` changes the server's answers" in run.stdout


@pytest.mark.parametrize("path", ["setup.cfg", "plugins/vllm/setup.cfg"])
def test_versions_are_written_once(path: str) -> None:
    assert "version = attr:" in (ROOT / path).read_text()
