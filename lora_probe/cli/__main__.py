"""`python -m lora_probe.cli`: the same as `lora-probe`. Python puts the current folder on its path then: add `-P`."""

from __future__ import annotations

import sys

from lora_probe.cli import main

if __name__ == "__main__":
    sys.exit(main())
