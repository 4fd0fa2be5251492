"""The part of a trace that is about one adapter.

In: a trace, and the name of an adapter in it. Out: a `Trace` with the loads, modules, findings, requests and rows of
that adapter alone, and the answers of the base model. Everything is read once, by the whole trace.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_probe.ledger import Ledger
from lora_probe.recording.reader import Trace
from lora_probe.recording.records import Load, ModuleRecord, RequestFinding, RequestRecord
from lora_probe.recording.rows import Rows, of_loads


@dataclass(frozen=True)
class _OneAdapter(Trace):
    whole: Trace = field(kw_only=True)
    name: str = field(kw_only=True)

    @cached_property
    def loads(self) -> tuple[tuple[Load, Ledger], ...]:
        return tuple(pair for pair in self.whole.loads if pair[0].name == self.name)

    @cached_property
    def _numbers(self) -> frozenset[int]:
        return frozenset(load.load for load, _ in self.loads)

    @cached_property
    def requests(self) -> tuple[RequestRecord, ...]:
        return tuple(request for request in self.whole.requests if request.adapter in (None, self.name))

    @cached_property
    def request_findings(self) -> tuple[RequestFinding, ...]:
        return tuple(finding for finding in self.whole.request_findings if finding.load in self._numbers)

    @cached_property
    def modules(self) -> dict[tuple[Any, ...], ModuleRecord]:
        return {at: record for at, record in self.whole.modules.items() if record.load in self._numbers}

    @cached_property
    def rows(self) -> Rows | None:
        """Also those of its requests that ran without a load of it."""
        if self.whole.rows is None:
            return None
        own = {request.id for request in self.requests if request.adapter is not None}
        return of_loads(self.whole.rows, self._numbers, own)


def of_adapter(trace: Trace, name: str) -> Trace:
    """The part of a trace that is about the adapter `name`."""
    return _OneAdapter(trace.path, trace.run, trace.processes, trace.other_runs, whole=trace, name=name)
