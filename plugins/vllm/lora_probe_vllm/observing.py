"""What vLLM logs, and what it refuses, while it handles an adapter.

In: a probe, a `with` block around a call of vLLM. Out: its log lines, and a refusal in the recording.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_probe_vllm.loads import ActiveLoad
from lora_probe_vllm.worker import Probe

Find = Callable[[Any], Probe | None]


class LogLines(logging.Handler):
    """Collects what vLLM logs at INFO or above while an adapter is loaded."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@contextmanager
def listening(log: LogLines) -> Iterator[None]:
    """Collect what vLLM's loggers report at INFO or above."""
    logger = logging.getLogger("vllm")
    logger.addHandler(log)
    try:
        yield
    finally:
        logger.removeHandler(log)


@contextmanager
def refusing(probe: Probe, active: ActiveLoad, stage: str) -> Iterator[None]:
    """Record an exception of vLLM as its refusal of the adapter, and raise it again."""
    try:
        yield
    except Exception as error:
        with probe.guard("a refusal"):
            probe.loading.refused(active, error, stage)
        raise
