"""The part of lora-probe that runs inside vLLM.

In: vLLM calls `register` in every one of its processes (entry-point group `vllm.general_plugins`). Out: nothing at
all, unless `LORA_PROBE_TRACE` names a folder; then the process that loads a model records into it.
"""

from __future__ import annotations

import logging
import os

__version__ = "0.1.0"

TRACE, KEEP = "LORA_PROBE_TRACE", "LORA_PROBE_KEEP"
"""The folder of the trace; and, for a user's own vLLM, where there is no run.json, the level."""
NOT_ARMED = "not-armed.txt"
"""Written into the trace folder by a process that could not arm the probe: why."""


def register() -> None:
    """Arm the probe in this process if `LORA_PROBE_TRACE` is set. May be called more than once.

    vLLM does not survive a plugin that raises; a probe that cannot be armed is logged and written down instead.
    """
    folder = os.environ.get(TRACE)
    if not folder:
        return
    try:
        from lora_probe_vllm.patching import arm

        arm()
    # Whatever it is: a server must not fail to start because somebody wanted to look at it.
    except Exception as error:
        why = str(error) or repr(error)
        logging.getLogger("vllm.lora_probe").error("lora-probe is not armed: %s", why)
        _write_down(folder, why)


def _write_down(folder: str, why: str) -> None:
    try:
        with open(os.path.join(folder, NOT_ARMED), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123
            file.write(why + "\n")
    except OSError as error:
        logging.getLogger("vllm.lora_probe").error("nor can it write into %s: %s", folder, error)
