"""What each engine has for a base, asked in a process of its own and remembered on disk.

In: a base, engines, PEFT's task type. Out: `Views`. No engine's library is imported here.
"""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora_probe.base import Base, EngineView
from lora_probe.engines import require
from lora_probe.engines.allowed import DESCRIBE as ALLOWED
from lora_probe.engines.child import DESCRIBE, LOG, POLL_SECONDS, VIEW, DescribeSpec, Progress, run_child
from lora_probe.engines.remembered import MAX_ANSWER, keys_of, remember, remembered
from lora_probe.errors import EngineStopped, ProbeError
from lora_probe.files import limits
from lora_probe.recording import write_json

_TAIL = 1_000_000
"""Bytes of the end of a log in which a cause is looked for."""
_NOT_THERE = re.compile(r"ModuleNotFoundError: (No module named '[\w.]+')")


@dataclass(frozen=True)
class Views:
    """What the engines answered, by engine; `missing` holds why one has no answer, in its own words."""

    found: dict[str, EngineView]
    missing: dict[str, str]


class _Interrupted(Exception):
    """The command was interrupted while a child process ran."""


class _Stopped(str):
    """Why an engine was stopped before it had an answer."""


def views_of(
    base: Base, engines: Sequence[str], task: str | None, progress: Callable[[str], None] = lambda _: None
) -> Views:
    """Ask each of `engines` what it has for `base`; those that are not remembered, at the same time.

    Raises:
        KeyboardInterrupt: after the child processes were ended.
    """
    found: dict[str, EngineView] = {}
    missing: dict[str, str] = {}
    asked: dict[str, str | None] = {}
    there: list[str] = []
    for engine in dict.fromkeys(engines):
        try:
            require(engine)
        except ProbeError as error:
            missing[engine] = error.message
            continue
        there.append(engine)
    for engine, key in keys_of(base, there, task).items():
        answer = remembered(key)
        if answer is None:
            asked[engine] = key
        elif isinstance(answer, EngineView):
            found[engine] = answer
        else:
            missing[engine] = answer
    if asked:
        progress(f"asking {' and '.join(asked)} which modules {_called(base)} has there")
    for engine, said in (_ask_all(base, list(asked), task) if asked else {}).items():
        answer = msgspec.json.decode(said, type=EngineView) if isinstance(said, bytes) else said
        if isinstance(answer, EngineView):
            found[engine] = answer
        else:
            missing[engine] = str(answer)
        # On an idle machine, or with other limits, an engine that was stopped may have an answer.
        if not isinstance(answer, _Stopped):
            remember(asked[engine], answer)
    order = [engine for engine in dict.fromkeys(engines) if engine in found]
    return Views({engine: found[engine] for engine in order}, missing)


def _called(base: Base) -> str:
    """What a person calls a base: its folder's name, or the id of one in the cache."""
    folder = base.path.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _ask_all(base: Base, engines: list[str], task: str | None) -> dict[str, bytes | str]:
    stop = threading.Event()
    with limits.waiting(), ThreadPoolExecutor(max_workers=len(engines)) as pool:
        running = {engine: pool.submit(_ask, base, engine, task, stop) for engine in engines}
        try:
            # A signal may arrive in another thread: this one looks for it from time to time.
            while wait(running.values(), POLL_SECONDS).not_done:
                pass
            return {engine: answer.result() for engine, answer in running.items()}
        except BaseException:
            stop.set()
            raise


def _ask(base: Base, engine: str, task: str | None, stop: threading.Event) -> bytes | str:
    """The engine's view as JSON, or why there is none."""

    def heed(_: Progress) -> None:
        if stop.is_set():
            raise _Interrupted

    with tempfile.TemporaryDirectory(prefix="lora-probe-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_json(folder / DESCRIBE, DescribeSpec(engine, str(base.path.resolve()), task))
        try:
            run_child(folder, 0, heed, ALLOWED)
            if (size := (folder / VIEW).stat().st_size) > MAX_ANSWER:
                return f"its answer has {size:,} bytes, more than the {MAX_ANSWER:,} that are read"
            return (folder / VIEW).read_bytes()
        except EngineStopped as error:
            return _Stopped(error.message)
        except ProbeError as error:
            return error.message + _cause(folder / LOG)


def _cause(log: Path) -> str:
    """A library that is not there, which vLLM tells its log alone."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        found = _NOT_THERE.findall(file.read().decode(errors="replace"))
    return f" ({found[-1]})" if found else ""
