"""The engines' views of a base model. Each engine describes it in a separate process; answers are cached on disk.

In: a base model, engines, how the base was loaded in training. Out: `Views`. No engine's library is imported here.
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

from lora_probe.adapter import TrainedAs
from lora_probe.base import Base, EngineView
from lora_probe.engines import require
from lora_probe.engines.allowed import DESCRIBE as ALLOWED
from lora_probe.engines.child import DESCRIBE, POLL_SECONDS, VIEW, DescribeSpec, Progress, run_child
from lora_probe.engines.folder import LOG
from lora_probe.engines.remembered import MAX_ANSWER, keys_of, remember, remembered
from lora_probe.errors import EngineStopped, ProbeError
from lora_probe.files import limits
from lora_probe.recording import write_json

_TAIL = 1_000_000
"""How many bytes at the end of a log are searched for a cause."""
_NOT_THERE = re.compile(r"ModuleNotFoundError: (No module named '[\w.]+')")


@dataclass(frozen=True)
class Views:
    """The engines' views by engine; `missing` contains why an engine has none, with its own message."""

    found: dict[str, EngineView]
    missing: dict[str, str]


class _Interrupted(Exception):
    """The command was interrupted while a child process ran."""


class _Stopped(str):
    """Why an engine was stopped before it had an answer."""


def views_of(
    base: Base, engines: Sequence[str], trained: TrainedAs, progress: Callable[[str], None] = lambda _: None
) -> Views:
    """The views of `base` of each of `engines`. Engines without a cached answer run at the same time.

    Raises:
        KeyboardInterrupt: after the child processes have been stopped.
    """
    found: dict[str, EngineView] = {}
    missing: dict[str, str] = {}
    to_run: dict[str, str | None] = {}
    installed: list[str] = []
    for engine in dict.fromkeys(engines):
        try:
            require(engine)
        except ProbeError as error:
            missing[engine] = error.message
            continue
        installed.append(engine)
    for engine, key in keys_of(base, installed, trained).items():
        answer = remembered(key)
        if answer is None:
            to_run[engine] = key
        elif isinstance(answer, EngineView):
            found[engine] = answer
        else:
            missing[engine] = answer
    if to_run:
        progress(f"listing the modules of {_name_of(base)} in {' and '.join(to_run)}")
    for engine, result in (_ask_all(base, list(to_run), trained) if to_run else {}).items():
        answer = msgspec.json.decode(result, type=EngineView) if isinstance(result, bytes) else result
        if isinstance(answer, EngineView):
            found[engine] = answer
        else:
            missing[engine] = str(answer)
        # An engine that was stopped may succeed next time: on an idle machine, or with other limits.
        if not isinstance(answer, _Stopped):
            remember(to_run[engine], answer)
    order = [engine for engine in dict.fromkeys(engines) if engine in found]
    return Views({engine: found[engine] for engine in order}, missing)


def _name_of(base: Base) -> str:
    """The name of a base model for messages: its folder's name, or its id if it is in the cache."""
    folder = base.path.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _ask_all(base: Base, engines: list[str], trained: TrainedAs) -> dict[str, bytes | str]:
    stop = threading.Event()
    with limits.waiting(), ThreadPoolExecutor(max_workers=len(engines)) as pool:
        running = {engine: pool.submit(_ask, base, engine, trained, stop) for engine in engines}
        try:
            # Waits in short steps: a signal that arrives in another thread must be handled in this one.
            while wait(running.values(), POLL_SECONDS).not_done:
                pass
            return {engine: answer.result() for engine, answer in running.items()}
        except BaseException:
            stop.set()
            raise


def _ask(base: Base, engine: str, trained: TrainedAs, stop: threading.Event) -> bytes | str:
    """The engine's view as JSON, or why there is none."""

    def heed(_: Progress) -> None:
        if stop.is_set():
            raise _Interrupted

    with tempfile.TemporaryDirectory(prefix="lora-probe-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_json(folder / DESCRIBE, DescribeSpec(engine, str(base.path.resolve()), trained))
        try:
            run_child(folder, 0, heed, ALLOWED)
            if (size := (folder / VIEW).stat().st_size) > MAX_ANSWER:
                return f"its answer has {size:,} bytes, more than the limit of {MAX_ANSWER:,}"
            return (folder / VIEW).read_bytes()
        except EngineStopped as error:
            return _Stopped(error.message)
        except ProbeError as error:
            return error.message + _cause(folder / LOG)


def _cause(log: Path) -> str:
    """The module that is not installed, which vLLM only logs."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        causes = _NOT_THERE.findall(file.read().decode(errors="replace"))
    return f" ({causes[-1]})" if causes else ""
