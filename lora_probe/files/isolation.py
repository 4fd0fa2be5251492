"""Isolation of child processes from code in the current folder, in an adapter or in a model.

In: the environment, the current folder, flags. Out: an environment, a search path and flags for a process that works in
its own empty folder. The current folder may be an untrusted checkout: nothing in it is imported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SAFE_PATH = "PYTHONSAFEPATH"
"""If set, Python does not put the current folder on its path. Unlike `-P`, an engine's workers inherit it."""
FOLDERS = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "TORCH_HOME",
    "TRANSFORMERS_CACHE",
    "VLLM_CACHE_ROOT",
    "VLLM_CONFIG_ROOT",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
)
"""Variables with paths of folders: relative ones are resolved from the user's current folder."""
_OURS = str(Path(__file__).resolve().parents[2])


def environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a process that is started in another folder."""
    safe = {name: value for name, value in given.items() if name != "PYTHONPATH"}
    safe |= {name: str(Path(given[name]).expanduser().absolute()) for name in FOLDERS if given.get(name)}
    safe[SAFE_PATH] = "1"
    if path := [entry for entry in given.get("PYTHONPATH", "").split(os.pathsep) if not _is_here(entry)]:
        safe["PYTHONPATH"] = os.pathsep.join(path)
    return safe


def leave_current_folder_off_the_path() -> None:
    """Remove the current folder from this process's search path, where `python -m` or PYTHONPATH put it."""
    sys.path[:] = [entry for entry in sys.path if not _is_here(entry) or _is_name(entry)]


def _is_here(entry: str) -> bool:
    """Whether an entry of a search path is the current folder, or relative to it."""
    here = os.path.realpath(entry) == os.path.realpath(Path.cwd())
    return not Path(entry).is_absolute() or (here and os.path.realpath(entry) != _OURS)


def _is_name(entry: str) -> bool:
    """Whether an entry is not a path: editable installs put the names of their hooks there."""
    return entry != "" and not os.path.lexists(entry)


def python(*arguments: str) -> list[str]:
    """The command of a Python process with the same interpreter; `-P` repeats what the environment sets."""
    return [sys.executable, "-P", *arguments]


@contextmanager
def empty_folder() -> Iterator[Path]:
    """An empty temporary folder to work in."""
    with tempfile.TemporaryDirectory(prefix="lora-probe-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def absolute_flags(flags: Sequence[str]) -> list[str]:
    """Engine flags for a process in another folder, with absolute paths. A value is a path if it begins with `./` or
    `../`, or if it contains a slash and exists: anything else may be the id of a model."""
    return [_absolute(flag) for flag in flags]


def _absolute(flag: str) -> str:
    name, equals, value = flag.partition("=") if flag.startswith("-") else ("", "", flag)
    # Unlike Path.exists, this returns False for invalid paths.
    near = value.startswith(("./", "../")) or ("/" in value and os.path.exists(value))  # noqa: PTH110
    if not near or Path(value).is_absolute():
        return flag
    return f"{name}{equals}{Path(value).absolute()}"
