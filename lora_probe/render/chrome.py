"""The load timeline in the Trace Event Format, which Perfetto and chrome://tracing open, beside a profile of vLLM.

In: a `Recording`. Out: a dictionary: a track for each process, a slice for each step that took time, an instant for
each other one. Times are in microseconds from the start of the process's recording. (Google, Trace Event Format, 2016.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_probe.recording import LoadEvent
from lora_probe.recording.process_trace import ProcessTrace
from lora_probe.render.cells import one_line
from lora_probe.render.results import Recording

SECOND = 1e6


def chrome(result: Recording) -> dict[str, Any]:
    """All steps of all processes."""
    trace = result.trace
    events: list[dict[str, Any]] = []
    for number, process in enumerate(trace.processes):
        events += _of_process(process, number)
    versions = trace.run.versions if trace.run is not None else {}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"tool": "lora-probe", **versions}}


def _of_process(process: ProcessTrace, number: int) -> Iterator[dict[str, Any]]:
    """The names of a track and of its stages, then its steps."""
    # Two processes of different machines may have the same pid.
    track = {"pid": number, "tid": 0}
    name = f"lora-probe {process.folder.name} (pid {process.process.pid})"
    yield {"name": "process_name", "ph": "M", **track, "args": {"name": one_line(name)}}
    stages: dict[str, int] = {}
    for event in process.of(LoadEvent):
        if event.stage not in stages:
            tid = stages[event.stage] = len(stages)
            yield {"name": "thread_name", "ph": "M", "pid": number, "tid": tid, "args": {"name": one_line(event.stage)}}
        yield _step(event, number, stages[event.stage])


def _step(event: LoadEvent, number: int, tid: int) -> dict[str, Any]:
    """A step is recorded when it ends."""
    took = event.seconds or 0.0
    text = one_line(f"{event.module}: {event.text}" if event.module else event.text)
    step = {
        "name": text,
        "cat": one_line(event.stage),
        "pid": number,
        "tid": tid,
        "ts": round(max(0.0, event.at - took) * SECOND, 3),
        "args": {"module": one_line(event.module), "text": one_line(event.text)},
    }
    return step | ({"ph": "X", "dur": round(took * SECOND, 3)} if took else {"ph": "i", "s": "t"})
