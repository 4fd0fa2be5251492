"""`python -m lora_probe.engines FOLDER`: the child process. In: a folder with the request. Out: the results in that
folder."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_probe.engines.child import run_in_child

if __name__ == "__main__":
    sys.exit(run_in_child(Path(sys.argv[1])))
