"""Limits for a process that reads untrusted files: CPU time and memory, both enforced by the kernel.

In: a `Budget`, and the folders to read. Out: limits on this process, and its current step on a `Board`, for the process
that waits for it (`guarded.py`). Without a budget, as in a program that calls lora-probe's functions, nothing here has
an effect.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_probe.files.untrusted import shown, storage_of

SECONDS = 60
"""CPU time for one folder. The largest real adapters that were measured take 40 s."""
SECONDS_PER_BYTE = 1 / 50_000_000
"""Additional time for each byte of weights: one processor reads and judges them ten times as fast."""
MEMORY = 768 * 2**20
"""Bytes that a process may allocate for one folder, in addition to its libraries."""
MEMORY_PER_BYTE = 4
"""Additional bytes for each byte on disk: bfloat16 is widened to float32 or float64 for computing."""
_WAITING, _ENDLESS, _STEP, _BUDGET, _LEFT, _LONGEST = 0, 3000, 1, 1024, 2048, 600
"""Offsets of the flags and the texts on a board, and the maximum length of a text in bytes."""


@dataclass(frozen=True)
class Budget:
    """Limits for one folder. None: the default, which grows with the folder's size on disk."""

    seconds: float | None = None
    memory: int | None = None


class Board:
    """Memory shared by two processes: the step and the limits of the working one, and whether it waits."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)

    def _read(self, at: int) -> str:
        size = int.from_bytes(self._memory[at : at + 2], "little")
        return self._memory[at + 2 : at + 2 + min(size, _LONGEST)].decode(errors="ignore")

    def _write(self, at: int, text: str) -> None:
        data = text.encode(errors="replace")[:_LONGEST]
        self._memory[at : at + 2 + len(data)] = len(data).to_bytes(2, "little") + data

    @property
    def step(self) -> str:
        """The current step, and its file."""
        return self._read(_STEP)

    @step.setter
    def step(self, text: str) -> None:
        self._write(_STEP, text)

    @property
    def budget(self) -> str:
        """The limits as text."""
        return self._read(_BUDGET)

    @budget.setter
    def budget(self, text: str) -> None:
        self._write(_BUDGET, text)

    @property
    def left(self) -> str:
        """What the process leaves behind if it is interrupted."""
        return self._read(_LEFT)

    @left.setter
    def left(self, text: str) -> None:
        self._write(_LEFT, text)

    @property
    def waiting(self) -> bool:
        """Whether the process waits for an engine."""
        return self._memory[_WAITING] == 1

    @waiting.setter
    def waiting(self, value: bool) -> None:
        self._memory[_WAITING] = int(value)

    @property
    def endless(self) -> bool:
        """Whether the command runs until the user interrupts it, so that Ctrl-C is how it ends."""
        return self._memory[_ENDLESS] == 1

    @endless.setter
    def endless(self, value: bool) -> None:
        self._memory[_ENDLESS] = int(value)


class _Limits:
    """The limits of this process, set by `enter`."""

    def __init__(self, budget: Budget, board: Board) -> None:
        self.budget, self.board = budget, board
        self.held, self.times = 0, 1.0
        self.start = self.room = 0
        self.lock = threading.Lock()

    def renew(self) -> None:
        """Start a full budget from here."""
        with self.lock:
            self.start, self.room = _allocated(), 0
            _limit("RLIMIT_CPU", math.ceil(time.process_time() + self.seconds))
            _limit("RLIMIT_DATA", self.start + self.memory)
            self.board.budget = f"{self.seconds:.0f} s of CPU time and {self.memory // 2**20:,} MiB of memory"

    def grow(self, size: int) -> None:
        with self.lock:
            self.room += size
            _limit("RLIMIT_DATA", self.start + self.memory + self.room)

    @property
    def seconds(self) -> float:
        fixed = self.budget.seconds
        return SECONDS + self.held * SECONDS_PER_BYTE * self.times if fixed is None else fixed

    @property
    def memory(self) -> int:
        fixed = self.budget.memory
        return MEMORY + self.held * MEMORY_PER_BYTE if fixed is None else fixed


_mine: _Limits | None = None


def enter(budget: Budget, board: Board) -> None:
    """Put this process under `budget` until it ends."""
    global _mine
    _mine = _Limits(budget, board)
    _limit("RLIMIT_CORE", 0)
    _mine.renew()


def allow(budget: Budget, left: str) -> None:
    """Set the user's limits for one folder, and the note about what an interrupted command leaves behind."""
    if _mine is not None:
        _mine.budget, _mine.board.left = budget, left
        _mine.renew()


def run_until_interrupted() -> None:
    """From now on, Ctrl-C is how this command ends, not an error."""
    if _mine is not None:
        _mine.board.endless = True


def active() -> bool:
    """Whether this process has a budget, and another process waits for it."""
    return _mine is not None


def begin(*folders: Path, times: float = 1) -> None:
    """Begin a new piece of work, with a new budget for the size of `folders` on disk.

    `times` is how often their bytes are read and used in computations.
    """
    if _mine is not None:
        step("listing the files", folders[0])
        _mine.held, _mine.times = 0, times
        _mine.renew()
        _mine.held = sum(map(held, folders))
        _mine.renew()


def step(what: str, path: str | Path = "") -> None:
    """Set the current step and its file, which the message names if the budget ends here."""
    if _mine is not None:
        _mine.board.step = f"{what} (`{shown(str(path), 300)}`)" if path else what


def make_room(size: int) -> None:
    """Allow `size` more bytes, for a mapped file."""
    if _mine is not None:
        _mine.grow(size)


@contextmanager
def importing() -> Iterator[None]:
    """Exempt imported libraries: some need gigabytes of address space, but no file decides how much."""
    if _mine is None:
        yield
        return
    before = _allocated()
    _limit("RLIMIT_DATA", None)
    try:
        yield
    finally:
        _mine.grow(max(0, _allocated() - before))


@contextmanager
def waiting() -> Iterator[None]:
    """Lift the limits while this process waits for an engine, which has its own; a new budget afterwards."""
    if _mine is None:
        yield
        return
    lift()
    _mine.board.waiting = True
    try:
        yield
    finally:
        _mine.board.waiting = False
        _mine.renew()


def lift() -> None:
    """Remove the limits: for a wait, or to report that they were used up."""
    _limit("RLIMIT_CPU", None)
    _limit("RLIMIT_DATA", None)


def raised(seconds: float) -> float:
    """`seconds`, or more if the user allows more for one folder."""
    return max(seconds, (_mine.budget.seconds or 0) if _mine is not None else 0)


def held(folder: Path) -> int:
    """Bytes on disk of the files in a folder and in its direct subfolders, each file once.

    Sparse files count with their real size, and links to files elsewhere do not count.
    """
    try:
        return sum(_on_disk(folder, str(storage_of(folder.resolve()))).values())
    except (OSError, RuntimeError):
        # The code that reads the folder reports why it cannot be listed.
        return 0


def _on_disk(folder: Path, storage: str, below: int = 1) -> dict[tuple[int, int], int]:
    sizes: dict[tuple[int, int], int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    sizes |= _on_disk(Path(entry.path), storage, below - 1) if below else {}
                elif entry.is_file() and (not entry.is_symlink() or _lies_in(storage, entry.path)):
                    status = entry.stat()
                    sizes[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sizes


def _lies_in(storage: str, path: str) -> bool:
    return os.path.commonpath([storage, os.path.realpath(path)]) == storage


def _limit(name: str, value: int | None) -> None:
    """Set a soft limit, `None` for the highest possible; never above the hard limit."""
    import resource

    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    top = value is None or (hard != resource.RLIM_INFINITY and value > hard)
    resource.setrlimit(kind, (hard if top or value is None else value, hard))


def _allocated() -> int:
    """Bytes of this process that count against RLIMIT_DATA."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmData:")[2].split(maxsplit=1)[0]) * 1024
