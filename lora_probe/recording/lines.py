"""A file of JSON lines that is only appended to, and that contains whole lines even if the disk is full for a while.

In: encoded records. Out: one line for each. A line that could not be written whole is taken back, so that the next one
begins on a line of its own; the caller may write it again later.
"""

from __future__ import annotations

import os
from pathlib import Path


class Lines:
    """One open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @property
    def removed(self) -> bool:
        """Whether another process has removed or replaced the file."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return True
        here = os.fstat(self._file)
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    @property
    def size(self) -> int:
        return os.fstat(self._file).st_size

    def write(self, data: bytes) -> None:
        """Append whole lines.

        Raises:
            OSError: nothing of `data` is in the file.
        """
        size = self.size
        view = memoryview(data)
        try:
            while view:
                # A disk that is almost full takes a part of the line, and the rest fails.
                view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def close(self) -> None:
        os.close(self._file)
