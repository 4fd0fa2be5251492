"""A real vLLM engine on another base, or with other flags, in a separate process: `python other_engine.py SPEC.json`.

In: base, settings of the engine, adapters by name, prompts. Out: a trace for each adapter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def record_all(
    base: Path,
    adapters: Mapping[str, Path],
    out: Path,
    python: str = sys.executable,
    prompts: tuple[str, ...] = ("Hi",),
    **settings: Any,
) -> Any:
    """Record each adapter, with one token of one prompt or with none (a CPU build loads experts and does not run
    them), and open the traces by name. `python` may be that of another vLLM."""
    from lora_probe import open_trace

    out.mkdir(parents=True)
    spec = {
        "base": str(base),
        "prompts": list(prompts),
        "settings": settings,
        "adapters": {name: str(folder) for name, folder in adapters.items()},
        "out": str(out),
    }
    (out / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [python, __file__, str(out / "spec.json")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: open_trace(out / name) for name in adapters}


def main(path: str) -> None:
    from conftest import start_engine

    spec = json.loads(Path(path).read_text())
    out = Path(spec["out"])
    engine = start_engine(Path(spec["base"]), out / "first", **spec["settings"])
    for name, folder in spec["adapters"].items():
        engine.record(Path(folder), out / name, prompts=spec["prompts"], max_tokens=1)


if __name__ == "__main__":
    main(sys.argv[1])
