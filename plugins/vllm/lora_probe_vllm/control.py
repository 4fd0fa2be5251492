"""The level of detail of a running recording, as `lora-probe attach` requests it.

In: the folder of the run, in which the request appears. Out: the requested level for the worker's next step, and the
answer in the trace.
"""

from __future__ import annotations

from lora_probe.errors import ProbeError
from lora_probe.recording import Level, TraceWriter
from lora_probe.recording.control import requested_level


class RequestedLevel:
    """The level that was requested and is not in use yet. `poll` is called by a thread, `taken` by the engine."""

    def __init__(self, writer: TraceWriter) -> None:
        self._writer = writer
        self._folder = writer.folder.parent
        self._error = ""
        self._level: Level | None = None
        # A request from before this recording was for another one.
        control = requested_level(self._folder)
        self._answered = control.request if control is not None else ""

    @property
    def pending(self) -> bool:
        return self._level is not None

    def poll(self) -> None:
        """Read a new request, and answer it. An idle engine has no step that could answer."""
        try:
            control = requested_level(self._folder)
        except ProbeError as error:
            if str(error) != self._error:
                self._error = str(error)
                self._writer.event("attach", error.message)
            return
        if control is None or control.request == self._answered:
            return
        self._level = control.keep
        self._writer.describe(keep=control.keep, control=control.request)
        # Without room on the disk, the answer waits for the next call.
        self._answered = control.request
        self._writer.event("attach", f"{control.keep} is recorded from the next step on")

    def taken(self) -> Level:
        """The pending level, which is in use from now on."""
        level, self._level = self._level, None
        assert level is not None
        return level
