"""Repositories of the Hugging Face Hub: addresses, and what the local cache holds of them.

In: an id (`org/name`) or an address. Out: the folder of its snapshot in the cache, and the command that downloads it.
Nothing is downloaded here. The layout of the cache is documented in huggingface_hub's "Understand caching".
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# `Path` merges the slashes of an address into one.
_ADDRESS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+]{1,9}):/+(?P<rest>\S+)")
_HUB = re.compile(r"(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+/[\w.-]+)(?:/.*)?", re.ASCII)


def cache() -> Path:
    """The folder of the cache, whether it exists or not."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def snapshot(name: str) -> Path | None:
    """The newest snapshot of a repository in the cache."""
    repository = cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = (repository / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def is_id(name: str) -> bool:
    """Whether `name` could be the id of a repository. A relative path with one slash could be one as well."""
    return _ID.fullmatch(name) is not None and ".." not in name and not name.startswith(("./", ".", "-"))


def address(path: str) -> str | None:
    """The address that a path was meant to be, with both slashes; None if it is not one."""
    match = _ADDRESS.fullmatch(path)
    return None if match is None else f"{match['scheme']}://{match['rest']}"


def id_at(address: str) -> str | None:
    """The id of the repository at an address of the hub."""
    match = _HUB.fullmatch(address.partition("://")[2])
    return match["id"] if match else None


def download(name: str) -> str:
    """The command that downloads a repository into the cache."""
    return f"hf download {name}"
