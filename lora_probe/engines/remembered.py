"""What engines have answered about bases, remembered on disk, so that the next check of a base asks nobody.

In: a base, an engine, PEFT's task type. Out: the answer of before, an `EngineView` or the reason why there is none, or
nothing. An answer is kept under the digest of everything that decides it, in a folder that only its owner can enter,
and is believed only if it is the file that was written there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from lora_probe.base import Base, EngineView
from lora_probe.base.engine_view import SCHEMA
from lora_probe.engines.launch import versions
from lora_probe.errors import UnreadableFile
from lora_probe.files import sha256

NO_CACHE = "LORA_PROBE_NO_CACHE"
"""Set to 1, nothing is read from the cache or written to it."""
MAX_ANSWER = 100_000_000
"""Bytes; a model with 61 layers of 384 experts has an answer of 20 million."""
_MAX_SETTINGS = 50_000_000
"""Bytes of a JSON file of a base: each may decide how its model is built. The largest vocabularies have 35 million."""
_DECIDING = ("VLLM_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRANSFORMERS_")
"""How variables begin by which an engine may build another model."""


class _Kept(msgspec.Struct, frozen=True):
    """The file: an answer, the key that it belongs to, and the digest of both."""

    key: str
    digest: str
    answer: msgspec.Raw


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine has, or why it had no answer."""

    view: EngineView | None = None
    why: str = ""


def remembered(key: str | None) -> EngineView | str | None:
    """The answer of before, or why there was none; None where nothing is remembered that can be believed."""
    if key is None or (folder := _folder()) is None:
        return None
    try:
        kept = msgspec.json.decode(_own(folder / f"{key}.json"), type=_Kept)
        if kept.key != key or kept.digest != _digest(key, bytes(kept.answer)):
            return None
        answer = msgspec.json.decode(kept.answer, type=_Answer)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return answer.view or answer.why or None


def remember(key: str | None, answer: EngineView | str) -> None:
    """Keep an answer, whole or not at all. A cache that cannot be written is no error."""
    if key is None or (folder := _folder()) is None:
        return
    body = msgspec.json.encode(_Answer(why=answer) if isinstance(answer, str) else _Answer(answer))
    kept = msgspec.json.encode(_Kept(key, _digest(key, body), msgspec.Raw(body)))
    with suppress(OSError):
        # Of two writers each has a file of its own, which only its owner can read, and the last one stays.
        number, name = tempfile.mkstemp(dir=folder, prefix=f"{key}.")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(kept)
            os.replace(name, folder / f"{key}.json")  # noqa: PTH105
        except OSError:
            os.unlink(name)  # noqa: PTH108
            raise


def keys_of(base: Base, engines: Sequence[str], task: str | None) -> dict[str, str | None]:
    """For each engine the digest of all that decides its answer; None where nothing is to be remembered.

    That is what the base's folder says and holds, the engine and its task, all that is installed, the machine, and the
    variables that engines look at.
    """
    nothing: dict[str, str | None] = dict.fromkeys(engines)
    if os.environ.get(NO_CACHE) == "1":
        return nothing
    digest = hashlib.sha256()
    try:
        for name, content in _settings(base.path):
            digest.update(msgspec.json.encode([name, content]))
    except (OSError, UnreadableFile):
        return nothing
    variables = sorted((k, v) for k, v in os.environ.items() if k.startswith(_DECIDING))
    machine = sys.version, platform.machine(), platform.node()
    digest.update(msgspec.json.encode([SCHEMA, task, sorted(versions().items()), machine, variables]))
    digest.update(msgspec.json.encode(sorted(_installed())))
    keys = nothing
    for engine in engines:
        own = digest.copy()
        own.update(engine.encode())
        keys[engine] = own.hexdigest()
    return keys


def _settings(folder: Path) -> Iterator[tuple[str, str]]:
    """The JSON files of a model's folder with the digest of their content, all other files with their size.

    Raises:
        UnreadableFile: a JSON file is no file, or too large to be read for this.
    """
    for path in sorted((*folder.iterdir(), *folder.glob("*/config.json"))):
        if not path.is_file():
            continue
        size = path.stat().st_size
        content = str(size)
        if path.suffix == ".json":
            if size > _MAX_SETTINGS:
                raise UnreadableFile(f"`{path}` has {size} bytes")
            content = sha256(path)
        yield str(path.relative_to(folder)), content


def _installed() -> set[str]:
    """The names of all that is installed, which hold its version: another library or plugin may change an answer."""
    names = set()
    for entry in filter(os.path.isdir, sys.path):
        names |= {name for name in os.listdir(entry) if name.endswith((".dist-info", ".egg-info", ".egg-link"))}  # noqa: PTH208
    return names


def _digest(key: str, body: bytes) -> str:
    return hashlib.sha256(key.encode() + body).hexdigest()


def _folder() -> Path | None:
    """The folder of the answers, made for its owner alone; None where there is none that is ours."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification says to ignore a relative one; it would lie in whatever folder is checked.
        cache = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
        folder = cache / "lora-probe" / "views"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    # A user without a home, a disk that is full or read-only.
    except (OSError, RuntimeError):
        return None
    return folder


def _own(path: Path) -> bytes:
    """The content of a file that this user wrote and nobody else can write: no link, no pipe.

    Raises:
        OSError: there is none.
    """
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(number, "rb") as file:
        status = os.fstat(number)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        if not mine or status.st_size > MAX_ANSWER:
            raise PermissionError(f"{path} is not believed")
        # A read of more than there is would take the memory for all of it.
        return file.read(status.st_size)
