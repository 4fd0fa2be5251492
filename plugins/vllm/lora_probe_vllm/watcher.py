"""What a worker does about once a second, also while its engine is idle.

In: a function. Out: a thread that calls it until `close`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

SECONDS = 1.0


class Watcher:
    """Calls `work` every second. Why it fails is logged once, and it is called again: a disk may have room later."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="lora-probe-watcher")
        self._thread.start()

    def close(self) -> None:
        """End the thread, and wait until it no longer touches the trace."""
        self._closing.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(SECONDS)

    def _run(self) -> None:
        logged = ""
        while not self._closing.wait(SECONDS):
            try:
                self._work()
            # Any exception: a thread of the probe must not print a traceback into the log of a server.
            except Exception as error:
                if repr(error) != logged:
                    logged = repr(error)
                    logging.getLogger("vllm.lora_probe").error("lora-probe cannot look for requests: %s", logged)
