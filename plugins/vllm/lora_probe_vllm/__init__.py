"""The part of lora-probe that runs inside vLLM.

In: vLLM calls `register` in every one of its processes (entry-point group `vllm.general_plugins`). Out: nothing at
all, unless `LORA_PROBE_TRACE` names a folder; then the process that loads a model records into it.
"""

from __future__ import annotations

import os

__version__ = "0.1.0"

TRACE, KEEP = "LORA_PROBE_TRACE", "LORA_PROBE_KEEP"


def register() -> None:
    """Arm the probe in this process if `LORA_PROBE_TRACE` is set. May be called more than once."""
    if os.environ.get(TRACE):
        from lora_probe_vllm.worker import arm

        arm()
