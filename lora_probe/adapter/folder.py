"""Finds an adapter on disk: its folder, and the files in it that loaders read.

In: a path. Out: the folder with `adapter_config.json`, and the file with the weights. If the weights have a name or a
place that no loader looks for, or the path leads to something else, the error comes from `not_found.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lora_probe.adapter.file_names import CONFIG, CONFIG_COPY, COPY, LOADED, PICKLE, VLLM_PICKLE, WEIGHTS
from lora_probe.adapter.not_found import lone_file, no_config, no_weights, nothing_there, several
from lora_probe.errors import UnreadableFile
from lora_probe.files import hub, sha256, shown, storage_of


def find_checkpoint(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The adapter folder that `path` refers to, and a note if there was a choice.

    Raises:
        UnreadableFile: it is not an adapter folder; the message says what it is instead.
    """
    try:
        return _find(path)
    # The path is too long, contains a NUL, or leads into a folder without permission.
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UnreadableFile(f"cannot read `{shown(str(path), 300)}`: {why}") from error


def located(path: Path) -> Path:
    """The folder that a user means: the path itself, the folder of an adapter's file, or the snapshot of a repository
    in the local Hugging Face cache."""
    try:
        if path.is_file() and path.name in (CONFIG, *LOADED) and os.path.lexists(path.parent / CONFIG):
            return path.parent
        if not os.path.lexists(path) and hub.is_id(str(path)):
            return hub.snapshot(str(path)) or path
    except (OSError, ValueError):
        # What reads the path reports why it cannot be read.
        return path
    return path


def _find(path: Path) -> tuple[Path, tuple[str, ...]]:
    path = located(path)
    if not path.exists():
        raise nothing_there(path)
    if not path.is_dir():
        raise lone_file(path)
    if (path / CONFIG).exists() or (path / CONFIG).is_symlink():
        return path, ()
    entries = listed(path)
    folders = [entry for entry in entries if (entry / CONFIG).is_file()]
    checkpoints = sorted(
        (entry for entry in folders if re.fullmatch(r"checkpoint-[0-9]{1,18}", entry.name)),
        key=lambda entry: int(entry.name.rpartition("-")[2]),
    )
    if checkpoints:
        names = ", ".join(entry.name for entry in checkpoints)
        return checkpoints[-1], (f"`{path}` holds {names}; using the last, {checkpoints[-1].name}",)
    raise no_config(path, folders, entries)


def listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UnreadableFile(f"cannot list `{folder}`: {error.strerror or error}") from error


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, unless it is a symbolic link that leads nowhere or out of the folder's storage.

    A Hugging Face cache links `snapshots/<commit>/<file>` to `blobs/` of the same repository: that is inside.
    """
    path = folder / name
    if not path.is_symlink():
        return path
    try:
        target, resolved = path.resolve(), folder.resolve()
        # For a cycle of links Python raises RuntimeError before 3.13; 3.13 returns a path that still is a link.
        why = "a cycle of links" if target.is_symlink() else ""
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "a cycle of links"
    if why:
        raise UnreadableFile(
            f"`{path}` is a symbolic link that leads nowhere: {why}", "replace it with the file itself"
        )
    if not target.is_relative_to(storage_of(resolved)):
        raise UnreadableFile(
            f"`{path}` is a symbolic link that leads out of its folder, to `{target}`",
            "copy the file into the folder if you trust it",
        )
    if not path.exists():
        raise UnreadableFile(
            f"`{path}` is a symbolic link to `{target}`, which does not exist",
            "replace it with the file itself, or download it again",
        )
    return path


def weights_path(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The file from which loaders read the weights, and notes about the choice.

    Raises:
        MissingWeights: no file has a name that loaders look for; the message says what is there instead.
        UnreadableFile: it is a symbolic link out of the folder.
    """
    names = [name for name in LOADED if os.path.lexists(folder / name)]
    if not names:
        raise no_weights(folder, [entry for entry in listed(folder) if entry.name != CONFIG])
    path, rest = inside(folder, names[0]), names[1:]
    notes = []
    if names[0] == VLLM_PICKLE:
        notes.append(f"only vLLM reads {VLLM_PICKLE}; PEFT looks for {WEIGHTS} and {PICKLE}")
    if rest:
        notes.append(f"{several(rest)} {'is' if len(rest) == 1 else 'are'} ignored: loaders read {names[0]} first")
    return path, (*notes, *_copies(folder, names[0]))


def _copies(folder: Path, weights: str) -> Iterator[str]:
    """Notes about copies of the config and of the weights, which no loader reads."""
    for entry in listed(folder):
        for name, pattern in ((CONFIG, CONFIG_COPY), (weights, COPY)):
            if entry.name not in (CONFIG, *LOADED) and pattern.fullmatch(entry.name):
                # A link that leads out of the folder is not followed.
                with suppress(UnreadableFile, OSError):
                    state = (
                        "the same as" if _same(inside(folder, entry.name), inside(folder, name)) else "different from"
                    )
                    yield f"no loader reads {shown(entry.name)}, a copy that is {state} {name}"


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other)


def weights_in(folder: Path) -> tuple[str, ...]:
    """The names in a folder that loaders look for, then others that begin like them."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return ()
    return (*(name for name in LOADED if name in names), *(name for name in names if name.startswith("adapter_model")))
