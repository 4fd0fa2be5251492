"""The cache of the engines' answers about base models, so that the next check of a base model starts no engine.

In: a base model, an engine, how the base was loaded in training. Out: the cached answer (an `EngineView`, or the reason
why there is none), or nothing. The key of an answer is a digest of everything that it depends on. Answers are in a
folder that only its owner can open, and are used only if the file is unchanged.
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

from lora_probe.adapter import TrainedAs
from lora_probe.base import Base, EngineView
from lora_probe.base.engine_view import SCHEMA
from lora_probe.engines.launch import versions
from lora_probe.errors import UnreadableFile
from lora_probe.files import sha256

NO_CACHE = "LORA_PROBE_NO_CACHE"
"""If it is 1, the cache is neither read nor written."""
MAX_ANSWER = 100_000_000
"""Bytes; the answer for a model with 61 layers of 384 experts has 20 million."""
_MAX_SETTINGS = 50_000_000
"""Bytes of a JSON file of a base model, which may decide how it is built. The largest vocabularies have 35 million."""
_DECIDING = ("VLLM_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "TRANSFORMERS_")
"""Prefixes of environment variables that may change how an engine builds a model."""


class _Kept(msgspec.Struct, frozen=True):
    """A file of the cache: an answer, its key, and the digest of both."""

    key: str
    digest: str
    answer: msgspec.Raw


class _Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine's view of a base model, or why it has none."""

    view: EngineView | None = None
    why: str = ""


def remembered(key: str | None) -> EngineView | str | None:
    """The cached view, or why there was none; None if nothing trustworthy is cached."""
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
    """Write an answer to the cache, completely or not at all. A cache that cannot be written is not an error."""
    if key is None or (folder := _folder()) is None:
        return
    body = msgspec.json.encode(_Answer(why=answer) if isinstance(answer, str) else _Answer(answer))
    kept = msgspec.json.encode(_Kept(key, _digest(key, body), msgspec.Raw(body)))
    with suppress(OSError):
        # Each of two writers has its own file, which only its owner can read; the last one wins.
        number, name = tempfile.mkstemp(dir=folder, prefix=f"{key}.")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(kept)
            os.replace(name, folder / f"{key}.json")  # noqa: PTH105
        except OSError:
            os.unlink(name)  # noqa: PTH108
            raise


def keys_of(base: Base, engines: Sequence[str], trained: TrainedAs) -> dict[str, str | None]:
    """For each engine the key of its answer: a digest of everything that the answer depends on; None to disable the
    cache.

    It covers the contents of the base model's folder, the engine, how the base was loaded, the installed packages, the
    machine, and the environment variables that engines read.
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
    digest.update(msgspec.json.encode([SCHEMA, trained, sorted(versions().items()), machine, variables]))
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
        UnreadableFile: a JSON file is not a regular file, or too large.
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
    """The metadata folders of all installed packages, whose names contain the version: any package may change an
    answer."""
    names = set()
    for entry in filter(os.path.isdir, sys.path):
        names |= {name for name in os.listdir(entry) if name.endswith((".dist-info", ".egg-info", ".egg-link"))}  # noqa: PTH208
    return names


def _digest(key: str, body: bytes) -> str:
    return hashlib.sha256(key.encode() + body).hexdigest()


def _folder() -> Path | None:
    """The cache folder, which only its owner can open; None if there is none, or if it belongs to another user."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The specification requires that a relative path is ignored; it would be inside the folder that is checked.
        cache = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
        folder = cache / "lora-probe" / "views"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    # The user has no home, or the disk is full or read-only.
    except (OSError, RuntimeError):
        return None
    return folder


def _own(path: Path) -> bytes:
    """The content of a regular file that belongs to this user and that nobody else can write.

    Raises:
        OSError: there is no such file.
    """
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(number, "rb") as file:
        status = os.fstat(number)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
        if not own or status.st_size > MAX_ANSWER:
            raise PermissionError(f"{path} is not trusted")
        # `read` allocates all that it is asked for, so ask for the real size.
        return file.read(status.st_size)
