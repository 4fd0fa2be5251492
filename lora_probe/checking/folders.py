"""Which adapter folders a command line requests.

In: paths, and whether to search the trees below them. Out: the folders, each once, and an error for every path without
an adapter. Nothing is opened here: the file names in a folder decide whether it is an adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_probe.adapter import located
from lora_probe.adapter.not_found import lone_file, nothing_there
from lora_probe.errors import ProbeError, UnreadableFile

_ADAPTER_FILE = re.compile(r"adapter_config\.json|adapter_model[-.](?:.*\.)?(?:safetensors|bin)(?:\.index\.json)?")
_BESIDE = ("chat_template.jinja", "tokenizer_config.json", "trainer_state.json")
"""Files that stand for their folder if an adapter is in it. Full models have them as well."""
_NUMBERS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class NotJudged:
    """A requested path without an adapter, or a folder that could not be judged."""

    path: Path
    error: ProbeError


@dataclass(frozen=True)
class Requested:
    """What a command line requests. `single`: the report is about one folder, whether it exists or not. `skipped` are
    files that are only judged with an adapter, and have none next to them."""

    folders: tuple[Path, ...]
    not_judged: tuple[NotJudged, ...]
    single: bool
    skipped: tuple[Path, ...] = ()


def requested(paths: Sequence[str], recursive: bool = False) -> Requested:
    """The folders of `paths`. A file of an adapter (commit hooks pass files) stands for its folder.

    With `recursive`, a path stands for every adapter folder in the tree below it, where links are not followed.
    """
    folders: dict[str, Path] = {}
    not_judged: list[NotJudged] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        try:
            if path.name in _BESIDE and path.is_file() and not _holds_adapter(path.parent):
                skipped.append(path)
                continue
            for folder in _below(path, not_judged) if recursive else (_folder(path),):
                folders.setdefault(os.path.realpath(folder), folder)
        except ProbeError as error:
            not_judged.append(NotJudged(path, error))
        except OSError as error:
            not_judged.append(NotJudged(path, UnreadableFile(f"cannot read `{path}`: {error.strerror or error}")))
    single = not recursive and len(folders) + len(not_judged) == 1
    return Requested(tuple(folders.values()), tuple(not_judged), single, tuple(skipped))


def is_adapter_file(name: str) -> bool:
    """Whether a file of this name is the config or the weights of an adapter."""
    return _ADAPTER_FILE.fullmatch(name) is not None


def _folder(path: Path) -> Path:
    try:
        if path.is_dir():
            return path
        if path.is_file() or path.is_symlink():
            beside = path.name in _BESIDE or path.name.startswith("adapter_model")
            if is_adapter_file(path.name) or (beside and _holds_adapter(path.parent)):
                return path.parent
            raise lone_file(path)
        if (folder := located(path)).is_dir():
            return folder
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"cannot read `{path}`: {error}") from error
    raise nothing_there(path)


def _holds_adapter(folder: Path) -> bool:
    return any(is_adapter_file(other.name) for other in folder.iterdir())


def _below(root: Path, not_judged: list[NotJudged]) -> Iterator[Path]:
    """The adapter folders of a tree by name, `checkpoint-20` before `checkpoint-100`."""
    root = _folder(root)

    def unreadable(error: OSError) -> None:
        why = UnreadableFile(f"cannot read `{error.filename}`: {error.strerror}")
        not_judged.append(NotJudged(Path(error.filename), why))

    any_adapter = False
    for folder, below, files in os.walk(root, onerror=unreadable):
        below.sort(key=_by_number)
        if any(map(is_adapter_file, files)):
            any_adapter = True
            yield Path(folder)
    if not any_adapter:
        raise UnreadableFile(
            f"no adapter in `{root}` or its subfolders",
            "pass a folder with adapter_config.json or adapter_model.safetensors in it",
        )


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBERS.split(name)]
