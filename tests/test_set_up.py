"""The set-up of `make`: which Python it chooses, what it installs, what it prints if it fails. With pip and wheels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lora_probe.engines.child import child_environment

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "set_up.py"


def wheel(folder: Path, name: str, code: str = "", *, version: str = "1.0", requires: str = "") -> None:
    """A wheel of one module, as an index serves them."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", code)
        archive.writestr(f"{info}/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def wheels_alone(folder: Path) -> dict[str, str]:
    """Settings with which pip looks in `folder` and at no index. It warns about the second place: it does not exist."""
    places = f"{folder} file:///no/such/folder"
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": places}


def set_up(folder: Path, *locked: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`.ci/set_up.py` from the wheels in `folder` alone."""
    (folder / "lock").write_text("# comment==1\n" + "".join(f"{requirement}\n" for requirement in locked))
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "venv"), str(folder / "lock")],
        env=os.environ | wheels_alone(folder) | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def imports(folder: Path, module: str) -> bool:
    command = [str(folder / "venv" / "bin" / "python"), "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_the_locked_packages_alone_are_installed(tmp_path: Path) -> None:
    wheel(tmp_path, "torch", requires="unwanted")
    wheel(tmp_path, "unwanted")
    done = set_up(tmp_path, "torch==1.0")
    assert done.returncode == 0, done.stderr
    assert imports(tmp_path, "torch")
    assert not imports(tmp_path, "unwanted")
    # Without a terminal there is a line for each phase, and pip's warning about the missing folder is not shown.
    phases = [line.strip().split()[0] for line in done.stdout.splitlines()]
    assert phases == ["using", "installing", "downloading", "unpacking", "done"]
    assert "installing 1 locked packages" in done.stdout
    assert "\r" not in done.stdout
    assert done.stderr == ""


def test_what_a_cuda_build_of_torch_needs_is_installed_too(tmp_path: Path) -> None:
    wheel(tmp_path, "torch", "import libcudnn", requires="libcudnn")
    wheel(tmp_path, "libcudnn")
    done = set_up(tmp_path, "torch==1.0")
    assert done.returncode == 0, done.stderr
    assert imports(tmp_path, "torch")
    assert "torch==1.0 is a CUDA build here" in done.stdout
    assert done.stdout.count("unpacking") == 2


def test_a_torch_that_does_not_import_is_an_error(tmp_path: Path) -> None:
    wheel(tmp_path, "torch", "import libcudnn")
    done = set_up(tmp_path, "torch==1.0")
    assert done.returncode == 1
    assert done.stderr.startswith("error: torch==1.0")
    assert "No module named 'libcudnn'" in done.stderr


def test_a_python_without_ensurepip_is_told_what_to_install(tmp_path: Path) -> None:
    """Debian has `ensurepip` in a package of its own: this Python's library is all here but for that."""
    library = Path(os.__file__).parent
    (tmp_path / "lib" / library.name).mkdir(parents=True)
    for entry in library.iterdir():
        if entry.name != "ensurepip":
            (tmp_path / "lib" / library.name / entry.name).symlink_to(entry)
    done = set_up(tmp_path, "torch==1.0", PYTHONHOME=str(tmp_path))
    assert done.returncode == 1
    assert "has no `ensurepip` module" in done.stderr
    assert f"apt install {library.name}-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make setup` with the Makefile and the set-up script alone, and no other programs than those in `folder`/bin."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(SCRIPT, folder / ".ci")
    (folder / "requirements.lock").write_text("torch==1.0\n")
    for settings in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / settings, folder)
        (folder / "plugins" / "vllm").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "plugins" / "vllm" / settings, folder / "plugins" / "vllm")
    for program in ("cat", "sha256sum", "cut", "touch"):
        (folder / "bin" / program).symlink_to(str(shutil.which(program)))
    return subprocess.run(
        [str(shutil.which("make")), *arguments, "setup"],
        cwd=folder,
        env=wheels_alone(folder) | {"PATH": str(folder / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_chooses_the_first_suitable_python_and_leaves_no_stamp_if_pip_fails(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    # A name in PATH that does not run, as a shim of pyenv for a version that is not chosen.
    (tmp_path / "bin" / "python3").symlink_to("/bin/false")
    (tmp_path / "bin" / "python3.12").symlink_to(sys.executable)
    done = make(tmp_path)
    assert f"({tmp_path}/bin/python3.12)" in done.stdout
    assert done.returncode == 2
    assert "ERROR: No matching distribution found for torch==1.0" in done.stderr
    # pip's warnings may explain its error: each is shown once.
    assert done.stderr.count("WARNING: Location 'file:///no/such/folder' is ignored") == 1
    assert "error: pip ended with status 1, and .venv is incomplete" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / ".venv").glob(".lock-*")) == []


@pytest.mark.parametrize("arguments", [(), ("PYTHON=python3",)])
def test_make_without_a_suitable_python_prints_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to("/bin/false")
    done = make(tmp_path, *arguments)
    assert done.returncode == 2
    error, made = done.stderr.splitlines()
    tried = "python3" if arguments else "python3 python3.13 python3.12 python3.11"
    assert error.startswith(f"error: no CPython 3.11, 3.12 or 3.13 found (tried {tried});")
    assert made.startswith("make: ***")
    assert not (tmp_path / ".venv").exists()


def test_the_metadata_and_the_makefile_agree_on_versions() -> None:
    metadata = (ROOT / "setup.cfg").read_text()
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}\n" in metadata
        assert f"python{version}" in (ROOT / "Makefile").read_text()


def test_openmp_threads_of_a_child_sleep_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert child_environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert child_environment()["OMP_WAIT_POLICY"] == "ACTIVE"
