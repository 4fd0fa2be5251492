"""Exit statuses. In: nothing. Out: numbers that scripts rely on."""

from __future__ import annotations

CLEAN, FOUND, UNJUDGED = 0, 1, 2
"""Judged and nothing wrong; something found, or not everything judged; nothing could be judged."""
INTERRUPTED, TERMINATED = 130, 143
"""After Ctrl-C, and after SIGTERM: as a shell says it."""
