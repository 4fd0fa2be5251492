"""The least that a hot path could do: to import what it needs, or to read the same bytes and do the same arithmetic.

    python benchmarks/limits.py read FILE ...
    python benchmarks/limits.py widen FILE ...
    python benchmarks/limits.py write SIZE FILE

In: files. Out: nothing; what counts is how long it takes. `read` reads into a small buffer. `widen` also makes float32
of bfloat16, on all processors.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

BUFFER = 2**20


def read(name: str) -> None:
    buffer = bytearray(BUFFER)
    with open(name, "rb", buffering=0) as file:  # noqa: PTH123
        while file.readinto(buffer):
            pass


def write(size: int, name: str) -> None:
    block = bytes(BUFFER)
    with open(name, "wb", buffering=0) as file:  # noqa: PTH123
        for start in range(0, size, BUFFER):
            file.write(block[: size - start])


def widen(name: str) -> None:
    """In two halves, or as many parts as there are processors."""
    import numpy as np

    size, count = os.path.getsize(name), len(os.sched_getaffinity(0))  # noqa: PTH202

    def part(number: int) -> None:
        raw, wide = np.empty(BUFFER // 2, np.uint16), np.empty(BUFFER // 2, np.uint32)
        at, end = (edge * size // count // 2 * 2 for edge in (number, number + 1))
        descriptor = os.open(name, os.O_RDONLY)
        while at < end and (got := os.preadv(descriptor, [memoryview(raw).cast("B")[: end - at]], at)):
            np.left_shift(raw[: got // 2], 16, out=wide[: got // 2], dtype=np.uint32)
            at += got
        os.close(descriptor)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(part, range(count)))


def main(what: str, *words: str) -> None:
    if what == "write":
        write(int(words[0]), words[1])
        return
    for name in words:
        {"read": read, "widen": widen}[what](name)


if __name__ == "__main__":
    main(*sys.argv[1:])
