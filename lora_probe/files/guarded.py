"""Work on untrusted files in a process of its own, which can be ended whatever it does.

In: a function that hands over what it finds, and a `Budget`. Out: what it handed over, as it comes; or a whole command,
whose output is printed here. A budget that is used up, a hang that ignores every signal, a crash in C: each is one
error that names the step, and this process goes on.
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from lora_probe.errors import ProbeError
from lora_probe.files import limits
from lora_probe.files.isolation import leave_current_folder_off_the_path
from lora_probe.files.limits import Board, Budget

AVAILABLE = sys.platform == "linux" and Path("/proc/self/status").exists()
"""Where processes are forked and the limits are known to hold. Elsewhere the work is done in this process."""
GRACE, ENGINE_GRACE = 1.0, 15.0
"""Seconds for a process to end by itself when the user stops the command; more where it has an engine to end."""

RESERVE = 2**20 + 2**18
"""Bytes that are kept for saying that there are no more."""

Send = Callable[[Any], None]


class OverBudget(ProbeError):
    """The work took more time or memory than it may, or its process died."""


@dataclass(frozen=True)
class _Written:
    """Text that a command prints; `error`: on standard error."""

    text: str
    error: bool


@dataclass(frozen=True)
class _Ended:
    """The work is done; `failure` is what it raised, if it did."""

    failure: ProbeError | None = None


def results(work: Callable[[Send], None], budget: Budget, board: Board | None = None) -> Iterator[Any]:
    """What `work` hands over, from a process of its own, which writes on `board` what it does.

    Raises:
        OverBudget: with the step at which the budget was used up, or at which the process died.
        ProbeError: what `work` raised. Any other exception of it becomes one that asks for a report.
    """
    if not AVAILABLE:
        yield from _here(work)
        return
    process = _Process(work, budget, board or Board())
    try:
        while True:
            item = process.receive()
            if isinstance(item, _Ended):
                break
            yield item
    finally:
        process.end()
    if item.failure is not None:
        raise item.failure


class _Process:
    """The process in which something works, from its start to its end."""

    def __init__(self, work: Callable[[Send], None], budget: Budget, board: Board) -> None:
        self.board = board
        self.temporary = tempfile.mkdtemp(prefix="lora-probe-")
        self.code: int | None = None
        results, sender = os.pipe()
        # Nobody writes to it: its end is the end of this process.
        watched, self._alive = os.pipe()
        # What is there already is no garbage; the copy shares its memory as long as nobody looks.
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for mine in (results, self._alive):
                    os.close(mine)
                _work(work, budget, self.board, os.fdopen(sender, "wb"), watched, self.temporary)
            finally:
                # Nothing of the process that was copied is to be flushed or cleaned up twice.
                os._exit(1)
        gc.unfreeze()
        for theirs in (sender, watched):
            os.close(theirs)
        self._results = os.fdopen(results, "rb")

    def receive(self) -> Any:
        """The next thing that was handed over.

        Raises:
            OverBudget: the process died, between two things or in the middle of one.
        """
        try:
            # Written by the copy of this very process, in which nothing of a file is executed.
            return pickle.load(self._results)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._wait(GRACE)
            raise _died(self.code or 0, self.board) from None

    def end(self) -> None:
        """End it if it still runs: politely, so that what it has started and half written goes, then not."""
        try:
            self._wait(0.1)
            if self.code is None:
                os.kill(self.pid, signal.SIGTERM)
                self._wait(ENGINE_GRACE if self.board.waiting else GRACE)
        finally:
            if self.code is None:
                os.kill(self.pid, signal.SIGKILL)
                self._wait(None)
            self._results.close()
            os.close(self._alive)
            # It is empty, unless the process was killed.
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _wait(self, seconds: float | None) -> None:
        """Wait for its end, as long as it takes for None; `code` is its status then, negative for a signal."""
        deadline = time.monotonic() + (seconds or 0)
        while self.code is None:
            pid, status = os.waitpid(self.pid, 0 if seconds is None else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.001)


def command(run: Callable[[], int], board: Board) -> int:
    """The exit status of a command that runs in a process of its own. What it prints is printed here.

    Raises as `results` does.
    """
    if not AVAILABLE:
        return run()

    def work(send: Send) -> None:
        sys.stdout, sys.stderr = _Forwarded(sys.stdout, send, False), _Forwarded(sys.stderr, send, True)
        send(run())

    status = 2
    stopped = True
    try:
        for item in results(work, Budget(), board):
            if isinstance(item, _Written):
                _write(item)
            else:
                status = item
        stopped = False
    finally:
        if stopped and sys.stderr.isatty():
            # A live line that was cut off has hidden the cursor.
            sys.stderr.write("\r\x1b[K\x1b[?25h")
            sys.stderr.flush()
    return status


class _Forwarded(io.TextIOBase):
    """A standard stream of the working process: whatever is written goes to the process that prints."""

    def __init__(self, stream: TextIO, send: Send, error: bool) -> None:
        self._stream, self._send, self._error = stream, send, error

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if text:
            self._send(_Written(text, self._error))
        return len(text)


def _write(item: _Written) -> None:
    stream = sys.stderr if item.error else sys.stdout
    try:
        if item.error:
            sys.stdout.flush()
        stream.write(
            item.text.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8")
        )
        stream.flush()
    except BrokenPipeError:
        # That the reader of a pipe has gone (`| head`) changes no exit status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        # What goes on cannot be told; what was found can.
        if not item.error:
            raise


def _here(work: Callable[[Send], None]) -> Iterator[Any]:
    handed: list[Any] = []
    try:
        work(handed.append)
    except ProbeError:
        yield from handed
        raise
    except Exception as error:
        yield from handed
        raise fault(error) from error
    yield from handed


def _work(
    work: Callable[[Send], None], budget: Budget, board: Board, sender: BinaryIO, watched: int, temporary: str
) -> None:
    """What the process of its own does. Ctrl-C in a terminal reaches it too: its parent says when it is to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    # A shell may have it ignored, and the limit of time with it.
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    # It does not live long: looking for garbage too often takes a third of the time for large files.
    gc.set_threshold(50_000, 50, 100)
    tempfile.tempdir = temporary
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True, name="lora-probe-parent").start()
    lock = threading.Lock()

    def send(item: Any) -> None:
        with lock:
            pickle.dump(item, sender, pickle.HIGHEST_PROTOCOL)
            sender.flush()

    ended = _Ended()
    reserve: bytearray | None = bytearray(RESERVE)
    try:
        leave_current_folder_off_the_path()
        limits.enter(budget, board)
        work(send)
    except ProbeError as error:
        ended = _Ended(error)
    except MemoryError:
        # What filled the memory is still there: without this even the next line would have no room.
        reserve = None  # noqa: F841
        limits.lift()
        ended = _Ended(_over("used up its memory", board))
    except KeyboardInterrupt:
        return
    except Exception as error:
        ended = _Ended(fault(error))
    with suppress(BrokenPipeError):
        send(ended)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent(watched: int) -> None:
    """A parent that is killed says nothing; whatever this process has started ends with it."""
    os.read(watched, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def fault(error: Exception) -> ProbeError:
    """An exception that nobody expected, as one error with the place in the code."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    words = "".join(traceback.format_exception_only(error)).strip()
    return ProbeError(
        f"lora-probe failed: {words} ({Path(place.filename).name}:{place.lineno})",
        "please report it, with what `lora-probe env` prints",
    )


def _died(code: int, board: Board) -> OverBudget:
    if code == -signal.SIGXCPU:
        return _over("used up its CPU time", board)
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    return _over(f"could not be judged: its process ended with {ended}", board)


def _over(what: str, board: Board) -> OverBudget:
    return OverBudget(
        f"{what} while {board.step or 'starting'}; the budget is {board.budget}",
        "look at that file first, no real adapter is known to need more; --timeout and --max-memory raise the limits",
    )
