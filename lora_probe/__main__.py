"""The command `lora-probe`, and `python -m lora_probe`.

In: arguments. Out: the exit status. Python puts the current folder on its path for `-m`: add `-P`.
"""

from __future__ import annotations

import gc
import sys

from lora_probe.cli.ending import supervised


def main() -> int:
    """Run the command line in a process of its own. It is imported there: this one only waits, and stays small."""
    return supervised(_run)


def _run() -> int:
    # Imports make no garbage, and looking for it takes 5 % of their time.
    gc.disable()
    try:
        from lora_probe.cli.main import run
    finally:
        gc.enable()
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
