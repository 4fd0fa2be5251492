"""What each engine has for a base, asked in a process of its own and remembered on disk.

In: a base, engines, PEFT's task type. Out: `Views`. No engine's library is imported here; an answer depends on the
base's `config.json`, the versions that are installed and the task, and is kept under the digest of these.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import msgspec

from lora_probe.base import Base
from lora_probe.engines import require
from lora_probe.engines.child import DESCRIBE, LOG, VIEW, DescribeSpec, Progress, run_child
from lora_probe.engines.launch import versions
from lora_probe.errors import ProbeError
from lora_probe.tracefile import write_json
from lora_probe.view import SCHEMA, EngineView

NO_CACHE = "LORA_PROBE_NO_CACHE"
"""Set to 1, nothing is read from the cache or written to it."""

_NOT_THERE = re.compile(r"ModuleNotFoundError: (No module named '[\w.]+')")


@dataclass(frozen=True)
class Views:
    """What the engines answered, by engine; `missing` holds why one has no answer, in its own words."""

    found: dict[str, EngineView]
    missing: dict[str, str]


class _Stopped(Exception):
    """The command was interrupted while a child process ran."""


def views_of(
    base: Base, engines: Sequence[str], task: str | None, progress: Callable[[str], None] = lambda _: None
) -> Views:
    """Ask each of `engines` what it has for `base`; those that are not remembered, at the same time.

    Raises:
        KeyboardInterrupt: after the child processes were ended.
    """
    found: dict[str, EngineView] = {}
    missing: dict[str, str] = {}
    asked: dict[str, Path | None] = {}
    for engine in dict.fromkeys(engines):
        try:
            require(engine)
        except ProbeError as error:
            missing[engine] = error.message
            continue
        place = _place(base, engine, task)
        if (view := _remembered(place)) is not None:
            found[engine] = view
        elif (why := _remembered_failure(place)) is not None:
            missing[engine] = why
        else:
            asked[engine] = place
    if asked:
        progress(f"asking {' and '.join(asked)} which modules {_called(base)} has there")
    for engine, answer in _ask_all(base, list(asked), task).items():
        if isinstance(answer, EngineView):
            found[engine] = answer
            _remember(asked[engine], answer)
        else:
            missing[engine] = answer
            _remember_failure(asked[engine], answer)
    order = [engine for engine in dict.fromkeys(engines) if engine in found]
    return Views({engine: found[engine] for engine in order}, missing)


def _called(base: Base) -> str:
    """What a person calls a base: its folder's name, or the id of one in the cache."""
    folder = base.path.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def _ask_all(base: Base, engines: list[str], task: str | None) -> dict[str, EngineView | str]:
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, len(engines))) as pool:
        running: dict[str, Future[EngineView | str]] = {
            engine: pool.submit(_ask, base, engine, task, stop) for engine in engines
        }
        try:
            return {engine: answer.result() for engine, answer in running.items()}
        except BaseException:
            stop.set()
            raise


def _ask(base: Base, engine: str, task: str | None, stop: threading.Event) -> EngineView | str:
    """The engine's view, or why there is none."""

    def heed(_: Progress) -> None:
        if stop.is_set():
            raise _Stopped

    with tempfile.TemporaryDirectory(prefix="lora-probe-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_json(folder / DESCRIBE, DescribeSpec(engine, str(base.path.resolve()), task))
        try:
            run_child(folder, 0, heed)
            return msgspec.json.decode((folder / VIEW).read_bytes(), type=EngineView)
        except ProbeError as error:
            return error.message + _cause(folder / LOG)


def _cause(log: Path) -> str:
    """A library that is not there, which vLLM tells its log alone."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = _NOT_THERE.findall(text)
    return f" ({found[-1]})" if found else ""


def _place(base: Base, engine: str, task: str | None) -> Path | None:
    """Where an answer is kept; None where nothing is."""
    if os.environ.get(NO_CACHE) == "1":
        return None
    try:
        config = (base.path / "config.json").read_bytes()
    except OSError:
        return None
    digest = hashlib.sha256(config)
    digest.update(msgspec.json.encode([SCHEMA, engine, task, sorted(versions().items())]))
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(home) if home else Path.home() / ".cache"
    except RuntimeError:
        # A user without a home.
        return None
    return cache / "lora-probe" / "views" / f"{digest.hexdigest()}.json"


def _remembered(place: Path | None) -> EngineView | None:
    """A damaged answer is as good as none: it is asked for again, and overwritten."""
    if place is None:
        return None
    try:
        return msgspec.json.decode(place.read_bytes(), type=EngineView)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


class _Failure(msgspec.Struct, frozen=True):
    """Why an engine had no answer, and the digest of all that was installed: another library may be the cure."""

    why: str
    installed: str


def _remembered_failure(place: Path | None) -> str | None:
    if place is None:
        return None
    try:
        failure = msgspec.json.decode(place.with_suffix(FAILED).read_bytes(), type=_Failure)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return failure.why if failure.installed == _installed() else None


def _remember_failure(place: Path | None, why: str) -> None:
    if place is not None:
        _write(place.with_suffix(FAILED), _Failure(why, _installed()))


FAILED = ".failed.json"


def _installed() -> str:
    every = sorted(f"{one.name} {one.version}" for one in distributions())
    return hashlib.sha256("\n".join(every).encode()).hexdigest()


def _remember(place: Path | None, view: EngineView) -> None:
    if place is not None:
        _write(place, view)


def _write(place: Path, answer: EngineView | _Failure) -> None:
    """Keep an answer, whole or not at all. A cache that cannot be written is no cache, and no error."""
    partial = place.with_suffix(f".{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.encode(answer))
        partial.replace(place)
    except OSError:
        with suppress(OSError):
            partial.unlink()
