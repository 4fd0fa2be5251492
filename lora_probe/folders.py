"""Which adapter folders a command line means.

In: the paths that were given, and whether the trees below them are meant. Out: the folders, each once, and an error for
every path that leads to none. Nothing is opened here: a folder counts by the names of the files in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lora_probe.errors import ProbeError, UnreadableFile

_ADAPTER_FILE = re.compile(r"adapter_config\.json|adapter_model[-.](?:.*\.)?(?:safetensors|bin)(?:\.index\.json)?")
Judged = TypeVar("Judged")
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Lost:
    """A path that was asked for and that leads to no adapter folder."""

    path: Path
    error: ProbeError


@dataclass(frozen=True)
class Asked:
    """What a command line asks for. `single`: the answer is about one folder, whether it is there or not."""

    folders: tuple[Path, ...]
    lost: tuple[Lost, ...]
    single: bool


def asked(paths: Sequence[str], recursive: bool = False) -> Asked:
    """The folders of `paths`. A file in an adapter folder (as a commit hook gives it) means its folder.

    With `recursive` a path means every adapter folder in the tree below it. Links to folders are not followed there.
    """
    found: dict[str, Path] = {}
    lost: list[Lost] = []
    for path in map(Path, paths):
        try:
            for folder in _below(path, lost) if recursive else (_folder(path),):
                found.setdefault(os.path.realpath(folder), folder)
        except ProbeError as error:
            lost.append(Lost(path, error))
    return Asked(tuple(found.values()), tuple(lost), not recursive and len(found) + len(lost) == 1)


def each(
    folders: Sequence[Path], lost: list[Lost], check: Callable[[Sequence[Path]], Iterator[Judged]]
) -> Iterator[Judged]:
    """The reports that can be had. A folder that cannot be judged is added to `lost`, and the others are judged."""
    rest = list(folders)
    # What is wrong with the options is wrong for all, and raised here.
    list(check(()))
    while rest:
        try:
            for one in check(tuple(rest)):
                yield one
                rest.pop(0)
            return
        except ProbeError as error:
            lost.append(Lost(rest.pop(0), error))


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name is the config or the weights of an adapter."""
    return _ADAPTER_FILE.fullmatch(name) is not None


def _folder(path: Path) -> Path:
    try:
        if path.is_dir():
            return path
        if path.is_file() or path.is_symlink():
            if is_adapter_file(path.name) or any(is_adapter_file(other.name) for other in path.parent.iterdir()):
                return path.parent
            raise UnreadableFile(f"`{path}` is a file, not an adapter folder", "give the folder of adapter_config.json")
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"`{path}` cannot be read: {error}") from error
    raise UnreadableFile(f"there is no folder `{path}`", f"in `{Path.cwd()}`" if not path.is_absolute() else "")


def _below(root: Path, lost: list[Lost]) -> Iterator[Path]:
    """The adapter folders of a tree in the order of their names, `checkpoint-20` before `checkpoint-100`."""
    root = _folder(root)

    def unreadable(error: OSError) -> None:
        lost.append(Lost(Path(error.filename), UnreadableFile(f"`{error.filename}` cannot be read: {error.strerror}")))

    some = False
    for folder, below, files in os.walk(root, onerror=unreadable):
        below.sort(key=_by_number)
        if any(map(is_adapter_file, files)):
            some = True
            yield Path(folder)
    if not some:
        raise UnreadableFile(
            f"no adapter in `{root}` or below it",
            "an adapter is a folder with adapter_config.json or adapter_model.safetensors",
        )


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBERS.split(name)]
