"""What went wrong for requests while one load of an adapter was active: running totals, written to the trace.

In: for each rule, the rows of a step by request. Out: a `RequestFinding` with the totals, repeated while they grow; the
last one counts. The first is written at once, as servers are usually killed without warning. The repetitions become
rarer as the totals grow, so that a server that does it wrong for days does not fill its disk with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lora_probe.ledger import Finding
from lora_probe.recording import RequestFinding, TraceWriter
from lora_probe.rules.lp6_applying import Affected

NAMED = 10
"""How many requests are named."""
REMEMBERED = 4096
"""A request is counted again if so many others came between two of its rows."""
GROWTH, MOST_SECONDS = 1.1, 60.0
"""A total is written again when it has grown by this factor, or after this time, while steps run."""

Judge = Callable[[str, Affected], Finding]


@dataclass
class _Total:
    """One rule's rows and requests. `recent` contains the last requests, so that each is counted once."""

    rows: int = 0
    requests: int = 0
    named: list[str] = field(default_factory=list)
    recent: dict[str, None] = field(default_factory=dict)
    written: float = 0.0
    rows_written: int = 0

    def add(self, rows: Mapping[str, int]) -> None:
        for request, count in rows.items():
            self.rows += count
            if request not in self.recent:
                self.requests += 1
                if len(self.named) < NAMED:
                    self.named.append(request)
            self.recent[request] = None
        while len(self.recent) > REMEMBERED:
            del self.recent[next(iter(self.recent))]

    def due(self, now: float) -> bool:
        grown = self.rows >= GROWTH * self.rows_written or now - self.written >= MOST_SECONDS
        return grown and self.rows != self.rows_written


class RequestFindings:
    """The totals of one load, from its first row until it ends."""

    def __init__(self, writer: TraceWriter, load: int, adapter: str) -> None:
        self._writer, self._load, self._adapter = writer, load, adapter
        self._totals: dict[Judge, _Total] = {}

    def rows(self, judge: Judge) -> int:
        """How many rows a rule is about so far."""
        return self._totals[judge].rows if judge in self._totals else 0

    def add(self, judge: Judge, rows: Mapping[str, int]) -> None:
        """Count the rows of a step, by request, for which the rule `judge` has a finding."""
        if rows:
            self._totals.setdefault(judge, _Total()).add(rows)

    def write(self, final: bool = False) -> None:
        """Write the totals that have grown and are due; with `final`, all that have grown."""
        now = time.monotonic()
        for judge, total in self._totals.items():
            if total.due(now) or (final and total.rows != total.rows_written):
                total.written, total.rows_written = now, total.rows
                more = total.requests - len(total.named)
                finding = judge(self._adapter, Affected(total.rows, tuple(total.named), more))
                self._writer.record(
                    RequestFinding(self._load, finding.code, finding.message, total.rows, list(total.named), more)
                )
