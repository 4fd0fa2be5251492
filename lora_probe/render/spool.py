"""Texts that are kept on disk until they are printed: those of thousands of adapters are too long for the memory.

In: texts, one after the other. Out: the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator


class Spool:
    """A list of texts in a file without a name, which is gone with the process."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=2**24)  # noqa: SIM115
        self._sizes: list[int] = []

    def append(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._file.write(data)
        self._sizes.append(len(data))

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        for size in self._sizes:
            yield self._file.read(size).decode("utf-8", "surrogatepass")
