"""The command `lora-probe`, and `python -m lora_probe`.

In: arguments. Out: the exit status. With `-m`, Python adds the current folder to its path; `-P` prevents this.
"""

from __future__ import annotations

import gc
import sys

from lora_probe.cli.ending import supervised


def main() -> int:
    """Run the command line in a process of its own. This process only waits: it imports almost nothing."""
    return supervised(_run, sys.argv[1:])


def _run() -> int:
    # Imports create no garbage, and collecting it takes 5 % of their time.
    gc.disable()
    try:
        from lora_probe.cli.main import run
    finally:
        gc.enable()
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
