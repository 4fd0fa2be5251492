"""The command `lora-probe`, and `python -m lora_probe`.

In: arguments. Out: the exit status. Python puts the current folder on its path for `-m`: add `-P`.
"""

from __future__ import annotations

import gc
import sys


def main() -> int:
    """Import the command line and run it. Imports make no garbage, and looking for it takes 5 % of their time."""
    gc.disable()
    try:
        from lora_probe.cli import main as run
    finally:
        gc.enable()
    return run()


if __name__ == "__main__":
    sys.exit(main())
