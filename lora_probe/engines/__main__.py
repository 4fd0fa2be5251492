"""`python -m lora_probe.engines FOLDER`: the child process of `trace`. In: run.json. Out: the rest of the trace."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_probe.engines.launch import run_in_child

if __name__ == "__main__":
    sys.exit(run_in_child(Path(sys.argv[1])))
