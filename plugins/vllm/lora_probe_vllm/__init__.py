"""The part of lora-probe that runs inside vLLM.

In: vLLM calls `register` in every one of its processes (entry-point group `vllm.general_plugins`). Out: nothing,
unless `LORA_PROBE_TRACE` is set to a folder; then the process that loads a model records into it.
"""

from __future__ import annotations

import logging
import os

__version__ = "0.1.0"

TRACE, KEEP, MAX_MB = "LORA_PROBE_TRACE", "LORA_PROBE_KEEP", "LORA_PROBE_MAX_MB"
"""The folder of the trace; and, for a user's own vLLM, which has no run.json, the level of detail, and how many
megabytes of rows each worker keeps."""
STRICT, METRICS = "LORA_PROBE_STRICT", "LORA_PROBE_METRICS"
"""`1`: refuse adapters that do not take effect as a whole; add lora-probe's metrics to vLLM's."""
NOT_ARMED = "not-armed.txt"
"""A file in the trace folder with the reason why a process could not arm the probe."""


OURS = "LORA_PROBE_"
"""What all variables of ours begin with."""
RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"


def switched_on(name: str) -> bool:
    return os.environ.get(name) == "1"


def register() -> None:
    """Arm the probe in this process if `LORA_PROBE_TRACE` is set. May be called more than once.

    A plugin that raises ends vLLM. If the probe cannot be armed, the reason is logged and written to a file instead.
    """
    folder = os.environ.get(TRACE)
    if not folder:
        for name in (STRICT, METRICS):
            if switched_on(name):
                logging.getLogger("vllm.lora_probe").warning("%s=1 has no effect without %s", name, TRACE)
        return
    try:
        from lora_probe_vllm.patching import arm

        if switched_on(METRICS):
            from lora_probe_vllm.metrics import add_to_server

            add_to_server()
        arm()
        _copied_by_ray()
    # Any exception: a server must not fail to start because of the probe.
    except Exception as error:
        why = str(error) or repr(error)
        logging.getLogger("vllm.lora_probe").error("lora-probe is not active: %s", why)
        _write_reason(folder, why)


def _copied_by_ray() -> None:
    """Ray starts workers with an environment of its own. vLLM copies its own variables and those with the prefixes that
    are listed here, from the process that starts them."""
    prefixes = os.environ.get(RAY_PREFIXES, "").split(",")
    if OURS not in prefixes:
        os.environ[RAY_PREFIXES] = ",".join([*filter(None, prefixes), OURS])


def _write_reason(folder: str, why: str) -> None:
    try:
        with open(os.path.join(folder, NOT_ARMED), "w", encoding="utf-8") as file:  # noqa: PTH118, PTH123
            file.write(why + "\n")
    except OSError as error:
        logging.getLogger("vllm.lora_probe").error("lora-probe cannot write into %s: %s", folder, error)
