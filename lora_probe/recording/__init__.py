"""The recording format: a folder `RUN.lptrace` with the records and rows of a run.

In: records and rows from engines, through `TraceWriter`. Out: a `Trace`, read from the files alone.
"""

from __future__ import annotations

from lora_probe.recording.placed import Floats, Placed
from lora_probe.recording.process_trace import Dropped, ProcessTrace
from lora_probe.recording.reader import Trace, open_trace
from lora_probe.recording.records import (
    DECODE,
    LEVELS,
    PREFILL,
    REPLICA_LOADS,
    SCHEMA,
    Level,
    Load,
    LoadEvent,
    ModuleRecord,
    NamedAdapter,
    NextTokens,
    Outcome,
    Process,
    Prompt,
    Record,
    RequestFinding,
    RequestRecord,
    Run,
    RunSpec,
    Score,
    Served,
    Shard,
    StationRecord,
    WeightsRecord,
)
from lora_probe.recording.rows import Rows
from lora_probe.recording.scored import Scored
from lora_probe.recording.writer import TraceWriter, write_json

__all__ = [
    "DECODE",
    "LEVELS",
    "PREFILL",
    "REPLICA_LOADS",
    "SCHEMA",
    "Dropped",
    "Floats",
    "Level",
    "Load",
    "LoadEvent",
    "ModuleRecord",
    "NamedAdapter",
    "NextTokens",
    "Outcome",
    "Placed",
    "Process",
    "ProcessTrace",
    "Prompt",
    "Record",
    "RequestFinding",
    "RequestRecord",
    "Rows",
    "Run",
    "RunSpec",
    "Score",
    "Scored",
    "Served",
    "Shard",
    "StationRecord",
    "Trace",
    "TraceWriter",
    "WeightsRecord",
    "open_trace",
    "write_json",
]
