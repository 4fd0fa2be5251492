"""Pages that wait on disk until they are printed: those of thousands of adapters do not fit into memory.

In: pages, one after the other. Out: the same.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from typing import Any


class Spool:
    """Values in an unnamed file, which is gone when the process ends."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=2**24)  # noqa: SIM115
        self._count = 0

    def append(self, page: Any) -> None:
        # Only this process can read it, and it reads what it wrote.
        pickle.dump(page, self._file, pickle.HIGHEST_PROTOCOL)
        self._count += 1

    def __iter__(self) -> Iterator[Any]:
        self._file.seek(0)
        for _ in range(self._count):
            yield pickle.load(self._file)
