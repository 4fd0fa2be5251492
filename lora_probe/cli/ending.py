"""How a command ends: every error as one message, every signal as an exit status.

In: a command. Out: its exit status. The modules that print are imported only when there is something to print, so that
the process that waits for the command stays small.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lora_probe.errors import ProbeError
from lora_probe.files import guarded
from lora_probe.files.limits import Board

CLEAN, FOUND, UNJUDGED = 0, 1, 2
"""Judged and nothing wrong; something found, or not all of it judged; nothing could be judged."""
INTERRUPTED = 130
"""After Ctrl-C, as shells report it: 128 plus the number of the signal. After SIGTERM it is 143."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which systemd and `timeout` send, or SIGHUP, which a closed terminal sends. As after Ctrl-C, running
    engines are ended and incomplete files removed."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


def supervised(run: Callable[[], int], arguments: Sequence[str]) -> int:
    """Run the command of these arguments in a process of its own, and return its exit status."""
    # A stream that was closed before the start is None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    board = Board()
    with _terminable():
        try:
            return guarded.command(lambda: reported(run, arguments), board)
        except KeyboardInterrupt as stop:
            if board.endless and not isinstance(stop, _Terminated):
                return CLEAN
            _complain("interrupted", board.left)
            return stop.status if isinstance(stop, _Terminated) else INTERRUPTED
        except OSError as error:
            from lora_probe.render.console import discard_output

            # The rest of the buffer cannot be written either.
            discard_output()
            return _failed(ProbeError(f"cannot write the output: {error.strerror or error}"))
        except Exception as error:
            return _failed(error, arguments)


def reported(run: Callable[[], int], arguments: Sequence[str]) -> int:
    """Run a command in this process. Its errors are printed, and decide the exit status."""
    try:
        return run()
    except SystemExit as stop:
        # After `--help` and `--version`.
        return int(stop.code or 0)
    # Out of memory, not even a message can be printed: the waiting process prints it.
    except MemoryError:
        raise
    except Exception as error:
        return _failed(error, arguments)


def _failed(error: Exception, arguments: Sequence[str] = ()) -> int:
    """Print an error in the format of the output, which programs read, and as a sentence."""
    failure = error if isinstance(error, ProbeError) else guarded.fault(error)
    if (name := _requested_format(arguments)) is not None:
        from lora_probe.render.formats import present_error

        present_error(name, failure)
    _complain(failure.message, failure.hint)
    return failure.exit_code


def _requested_format(arguments: Sequence[str]) -> str | None:
    """The value of `--format`, also in a command line that cannot be parsed otherwise."""
    own = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--format")
    try:
        requested: str | None = parser.parse_known_args(own)[0].format
    except argparse.ArgumentError:
        # `--format` is the last word.
        return None
    return requested


def _complain(message: str, hint: str) -> None:
    from lora_probe.render.console import complain

    complain(message, hint)


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _Terminated(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
