"""Exit statuses. In: nothing. Out: numbers that scripts rely on."""

from __future__ import annotations

CLEAN, FOUND, UNJUDGED = 0, 1, 2
"""Judged and nothing wrong; something found, or not everything judged; nothing could be judged."""
INTERRUPTED = 130
"""After Ctrl-C, as a shell says it: 128 and the number of the signal. After SIGTERM it is 143."""
