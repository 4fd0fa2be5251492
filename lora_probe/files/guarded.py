"""Work on untrusted files in a separate process, which can be stopped whatever it does.

In: a function that sends its results, and a `Budget`. Out: the results as they arrive; or a whole command, whose output
is printed by this process. A used-up budget, a hang that ignores every signal, a crash in C: each is one error that
names the step, and this process continues.
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
"""Whether processes can be forked and the limits work. Otherwise the work is done in this process."""
GRACE, ENGINE_GRACE = 1.0, 15.0
"""Seconds for a process to end by itself when the user stops the command; more if it has to stop an engine."""

RESERVE = 2**20 + 2**18
"""Bytes of memory reserved for reporting that there is no more."""

Send = Callable[[Any], None]


class OverBudget(ProbeError):
    """The work used more time or memory than allowed, or its process died."""


@dataclass(frozen=True)
class _Written:
    """Text that a command prints; `error`: to standard error."""

    text: str
    error: bool


@dataclass(frozen=True)
class _Ended:
    """The work has ended; `failure` is the exception that it raised, if any."""

    failure: ProbeError | None = None


def results(work: Callable[[Send], None], budget: Budget, board: Board | None = None) -> Iterator[Any]:
    """The results that `work` sends from a separate process, which writes its current step to `board`.

    Raises:
        OverBudget: the budget was used up or the process died, with the step.
        ProbeError: what `work` raised. Any other exception becomes one that asks for a bug report.
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
    """The working process, from its start to its end."""

    def __init__(self, work: Callable[[Send], None], budget: Budget, board: Board) -> None:
        self.board = board
        self.temporary = tempfile.mkdtemp(prefix="lora-probe-")
        self.code: int | None = None
        results, sender = os.pipe()
        # Nothing is written to it: it closes when this process ends.
        watched, self._alive = os.pipe()
        # Existing objects are not garbage; the copy shares their memory as long as nothing touches them.
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for parents_end in (results, self._alive):
                    os.close(parents_end)
                _work(work, budget, self.board, os.fdopen(sender, "wb"), watched, self.temporary)
            finally:
                # The copied process must not flush or clean up anything a second time.
                os._exit(1)
        gc.unfreeze()
        for childs_end in (sender, watched):
            os.close(childs_end)
        self._results = os.fdopen(results, "rb")

    def receive(self) -> Any:
        """The next result.

        Raises:
            OverBudget: the process died, between two results or in the middle of one.
        """
        try:
            # Written by a copy of this process, which executes nothing from a file.
            return pickle.load(self._results)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._wait(GRACE)
            raise _died(self.code or 0, self.board) from None

    def end(self) -> None:
        """Stop it if it still runs: with SIGTERM, so that it can stop its engine and clean up, then with SIGKILL."""
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
            # Empty, unless the process was killed.
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _wait(self, seconds: float | None) -> None:
        """Wait for its end, without limit for None. It sets `code` to the exit status, negative for a signal."""
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
    """The exit status of a command that runs in a separate process. Its output is printed by this process.

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
            # An interrupted progress line has hidden the cursor.
            sys.stderr.write("\r\x1b[K\x1b[?25h")
            sys.stderr.flush()
    return status


class _Forwarded(io.TextIOBase):
    """A standard stream of the working process: its text is sent to the process that prints."""

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
        # A closed pipe (`| head`) does not change the exit status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:
        # Progress that cannot be printed is dropped; results are not.
        if not item.error:
            raise


def _here(work: Callable[[Send], None]) -> Iterator[Any]:
    sent: list[Any] = []
    try:
        work(sent.append)
    except ProbeError:
        yield from sent
        raise
    except Exception as error:
        yield from sent
        raise fault(error) from error
    yield from sent


def _work(
    work: Callable[[Send], None], budget: Budget, board: Board, sender: BinaryIO, watched: int, temporary: str
) -> None:
    """The working process. Ctrl-C in a terminal reaches it too, but its parent decides when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    # A shell may have set it to be ignored, which would disable the time limit.
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    # The process is short-lived: frequent garbage collection takes a third of the time for large files.
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
        # The memory is still full: this frees enough for the next lines.
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
    """Kill this process when its parent ends, even if the parent was killed."""
    os.read(watched, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def fault(error: Exception) -> ProbeError:
    """An unexpected exception as one error, with its place in the code."""
    import traceback

    place = traceback.extract_tb(error.__traceback__)[-1]
    reason = "".join(traceback.format_exception_only(error)).strip()
    return ProbeError(
        f"lora-probe failed: {reason} ({Path(place.filename).name}:{place.lineno})",
        "report this bug with the output of `lora-probe env`",
    )


def _died(code: int, board: Board) -> OverBudget:
    if code == -signal.SIGXCPU:
        return _over("used up its CPU time", board)
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
    return _over(f"could not be judged: its process ended with {ended}", board)


def _over(what: str, board: Board) -> OverBudget:
    return OverBudget(
        f"{what} while {board.step or 'starting'}; the budget is {board.budget}",
        "check that file first, no known adapter needs more; raise the limits with --timeout and --max-memory",
    )
