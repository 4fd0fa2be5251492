"""The same work on many tensors, on all processors.

In: a function and what to call it with. Out: its results, in order. It must spend its time where other threads can run:
reading files, numpy's arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def one_blas_thread() -> None:
    """Let a matrix product take one thread, unless the user has set how many. Without effect once numpy is imported.

    Threads of our own take the other processors: small products gain nothing from threads that wait for each other.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def leave_to_others() -> None:
    """From now on, this process takes one processor: other processes do the same work."""
    global _shared
    _shared = True


_shared = False


def processors() -> int:
    """How many processors this process may use."""
    if _shared:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_processors(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """The result for each item, in order. An error of one is raised at its place, and what has not begun then is
    dropped."""
    count = min(processors(), len(items))
    if count < 2:
        yield from map(work, items)
        return
    # Commands that read no values do not pay for this.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(work, items)
