"""Which adapter folders a command line means.

In: the paths that were given, and whether the trees below them are meant. Out: the folders, each once, and an error for
every path that leads to none. Nothing is opened here: a folder counts by the names of the files in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_probe.errors import ProbeError, UnreadableFile

_ADAPTER_FILE = re.compile(r"adapter_config\.json|adapter_model[-.](?:.*\.)?(?:safetensors|bin)(?:\.index\.json)?")
_BESIDE = ("chat_template.jinja", "tokenizer_config.json", "trainer_state.json")
"""Files that are judged where an adapter lies beside them, and that a model has as well."""
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Lost:
    """A path that was asked for and that leads to no adapter folder."""

    path: Path
    error: ProbeError


@dataclass(frozen=True)
class Asked:
    """What a command line asks for. `single`: the answer is about one folder, whether it is there or not. `passed` are
    files that are judged with an adapter, and have none beside them."""

    folders: tuple[Path, ...]
    lost: tuple[Lost, ...]
    single: bool
    passed: tuple[Path, ...] = ()


def asked(paths: Sequence[str], recursive: bool = False) -> Asked:
    """The folders of `paths`. A file of an adapter (as a commit hook gives it) means its folder.

    With `recursive` a path means every adapter folder in the tree below it. Links to folders are not followed there.
    """
    found: dict[str, Path] = {}
    lost: list[Lost] = []
    passed: list[Path] = []
    for path in map(Path, paths):
        try:
            if path.name in _BESIDE and path.is_file() and not _holds_adapter(path.parent):
                passed.append(path)
                continue
            for folder in _below(path, lost) if recursive else (_folder(path),):
                found.setdefault(os.path.realpath(folder), folder)
        except ProbeError as error:
            lost.append(Lost(path, error))
        except OSError as error:
            lost.append(Lost(path, UnreadableFile(f"`{path}` cannot be read: {error.strerror or error}")))
    single = not recursive and len(found) + len(lost) == 1
    return Asked(tuple(found.values()), tuple(lost), single, tuple(passed))


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name is the config or the weights of an adapter."""
    return _ADAPTER_FILE.fullmatch(name) is not None


def _folder(path: Path) -> Path:
    try:
        if path.is_dir():
            return path
        if path.is_file() or path.is_symlink():
            ours = path.name in _BESIDE or path.name.startswith("adapter_model")
            if is_adapter_file(path.name) or (ours and _holds_adapter(path.parent)):
                return path.parent
            raise UnreadableFile(
                f"`{path}` is a file, and none of an adapter's",
                "give the folder of the adapter, or its adapter_config.json, or its weights",
            )
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"`{path}` cannot be read: {error}") from error
    raise UnreadableFile(f"there is no folder `{path}`", f"in `{Path.cwd()}`" if not path.is_absolute() else "")


def _holds_adapter(folder: Path) -> bool:
    return any(is_adapter_file(other.name) for other in folder.iterdir())


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
