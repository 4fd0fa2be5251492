"""A time in which nothing can be written: the disk is full, or the folder was made read-only.

In: each attempt to write, and what could not be written. Out: what waits until writing works again, the numbers of rows
and records that were too many to wait, and a sentence at the beginning and at the end. The state of one `TraceWriter`,
which holds its lock for each call.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from lora_probe.recording.rows import Rows

RETRY_SECONDS = 1.0
MAX_WAITING_ROWS, MAX_WAITING_LINES = 64_000_000, 4_000_000
"""Bytes of rows and of records that wait. Of more, the oldest rows and the newest records are lost."""


class Outage:
    """Without `report` every error is raised, and nothing waits."""

    def __init__(self, report: Callable[[str], None] | None) -> None:
        self.lost_rows = self.lost_records = 0
        self._report = report
        self._lines: deque[bytes] = deque()
        self._rows: deque[Rows] = deque()
        self._why = ""
        self._since = self._retry_at = 0.0
        self._before = 0, 0

    def __bool__(self) -> bool:
        """Whether the last attempt has failed."""
        return bool(self._why)

    @property
    def tolerated(self) -> bool:
        return self._report is not None

    def attempt(self, work: Callable[[], None]) -> bool:
        """Do something that writes. Returns whether it was done; during an outage it is only tried now and then."""
        if self._report is None:
            work()
            return True
        if self and time.monotonic() < self._retry_at:
            return False
        try:
            work()
        except OSError as error:
            self._begin(error)
            return False
        return True

    def _begin(self, error: OSError) -> None:
        assert self._report is not None
        now = time.monotonic()
        self._retry_at = now + RETRY_SECONDS
        if not self:
            self._since, self._before = now, (self.lost_rows, self.lost_records)
            self._report(f"the recording cannot be written: {error}; it will continue when this is possible again")
        self._why = str(error)

    def tell(self, text: str) -> None:
        """Report something about the disk that is not an error of it."""
        if self._report is not None:
            self._report(text)

    def keep_line(self, line: bytes) -> None:
        """Let a line of events.jsonl wait."""
        if sum(map(len, self._lines)) + len(line) > MAX_WAITING_LINES:
            self.lost_records += 1
        else:
            self._lines.append(line)

    def keep_rows(self, rows: Rows) -> None:
        """Let the rows of a segment wait."""
        self._rows.append(rows)
        while sum(part.nbytes for part in self._rows) > MAX_WAITING_ROWS:
            self.lost_rows += len(self._rows.popleft())

    def lines(self) -> Iterator[bytes]:
        """The lines that wait. Each is forgotten when the next one is requested."""
        while self._lines:
            yield self._lines[0]
            self._lines.popleft()

    def rows(self) -> Iterator[Rows]:
        """The rows that wait, a segment at a time, as in `lines`."""
        while self._rows:
            yield self._rows[0]
            self._rows.popleft()

    @property
    def summary(self) -> str:
        """What an outage was and what it cost; "" if there was none."""
        if not self:
            return ""
        seconds = time.monotonic() - self._since
        return f"nothing could be written for {seconds:.0f} s ({self._why}); {self._lost()}"

    def over(self) -> None:
        """Everything that waited was written."""
        if self._report is not None and self:
            self._report(f"the recording continues: {self.summary}")
        self._why = ""

    def last_chance(self) -> None:
        """The recording is being closed: the next attempt is made whatever the time."""
        self._retry_at = 0.0

    def end(self) -> None:
        """The recording was closed: what still waits is lost."""
        self.lost_rows += sum(map(len, self._rows))
        self.lost_records += len(self._lines)
        self._rows.clear()
        self._lines.clear()
        if self._report is not None and self:
            self._report(f"the recording has ended: {self.summary}")

    def _lost(self) -> str:
        lost = self.lost_rows - self._before[0], self.lost_records - self._before[1]
        named = [f"{count:,} {what}" for count, what in zip(lost, ("rows", "records"), strict=True) if count]
        return f"{' and '.join(named)} were lost" if named else "nothing was lost"
