"""What is at a path where no adapter, or no weights of one, were found.

In: the path, and what is in the folder. Out: one `UnreadableFile` that names it and what to do. Files are recognised by
their content; a name decides only if the content does not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_probe.adapter.file_names import BY_OTHERS, CONFIG, CONFIG_COPY, COPY, LOADED, SHARD, WEIGHTS, like_weights
from lora_probe.adapter.not_peft import not_peft
from lora_probe.errors import MissingWeights, ProbeError, UnreadableFile, command
from lora_probe.files import hub, shown, storage_of
from lora_probe.files.json_object import read_json

_RUN, _PROCESS = "run.json", "process.json"
"""Documents of a trace, and of each process in it. `recording` reads them; here a key shows that it is one."""
_READ_FIRST = 4
"""Files of a folder whose content is looked at."""
_MOST_FOLDERS = 1_000
"""Folders in which adapters are counted."""


def nothing_there(path: Path) -> UnreadableFile:
    """The error for a path that does not exist."""
    name = str(path)
    if (address := hub.address(name)) is not None:
        repository = hub.id_at(address)
        if repository is None:
            return UnreadableFile(
                f"`{shown(address, 300)}` is an address, and lora-probe reads only local folders",
                "download the adapter first, and pass its folder",
            )
        if hub.snapshot(repository) is not None:
            return UnreadableFile(
                f"`{shown(address, 300)}` is an address, not a folder", f"it is in the local cache: pass {repository}"
            )
        return UnreadableFile(
            f"`{shown(address, 300)}` is an address, and lora-probe does not download anything",
            f"download it first: {hub.download(repository)}\nthen pass {repository}",
        )
    where = "" if path.is_absolute() else f"; the current folder is `{Path.cwd()}`"
    if hub.is_id(name):
        return UnreadableFile(
            f"`{name}` was not found: it is neither a folder nor a repository in {hub.cache()}",
            f"check the path{where}\nif it is on the Hugging Face Hub, download it first: {hub.download(name)}",
        )
    return UnreadableFile(f"folder `{path}` does not exist", f"check the path{where}")


def lone_file(path: Path) -> UnreadableFile:
    """The error for a file that is not one of an adapter folder."""
    from lora_probe.adapter.foreign import foreign_file

    beside = (path.parent / CONFIG).exists()
    looked_at = like_weights(path.name) or path.stat().st_size
    if looked_at and (other := foreign_file(path)) is not None:
        return UnreadableFile(f"`{path}` {other.what}", other.hint)
    if not like_weights(path.name):
        return UnreadableFile(
            f"`{path}` is not a file of an adapter", f"pass the adapter's folder, its {CONFIG} or its weights"
        )
    to = _named_for_loaders(path.name)
    if beside and (loaded := [name for name in LOADED if (path.parent / name).exists()]):
        return UnreadableFile(
            f"`{path}` is not the file that loaders read: they read {loaded[0]} in that folder",
            f"pass `{path.parent}`; to check this file, copy it to another folder as {to}, next to {CONFIG}",
        )
    if beside:
        return UnreadableFile(
            f"`{path}` has a name that no loader looks for", f"rename it to {to}, and pass `{path.parent}`"
        )
    rename = "" if path.name in LOADED else f", and rename the weights to {to}"
    return UnreadableFile(
        f"there is no {CONFIG} next to `{path}`, the only file with rank, scaling and targets",
        f"copy {CONFIG} from the training output into `{path.parent}`{rename}; then pass `{path.parent}`",
    )


def no_config(path: Path, folders: Sequence[Path], entries: Sequence[Path]) -> UnreadableFile:
    """The error for a folder without a config. `folders` are its subfolders that have one."""
    names = [entry.name for entry in entries]
    entries = [entry for entry in entries if _stays(entry)]
    if _is_trace(entries):
        return UnreadableFile(f"`{path}` is a recorded trace, not an adapter", command("show", path))
    if folders:
        return _in_subfolders(path, folders)
    if (error := _config_copy(path, entries)) is not None:
        return error
    model = "config.json" in names or "model_index.json" in names
    weights = [name for name in names if name in LOADED or SHARD.fullmatch(name) or COPY.fullmatch(name)]
    if not model and (error := _foreign(f"`{path}` is not a PEFT adapter", entries)) is not None:
        return error
    if weights:
        return UnreadableFile(
            f"`{path}` holds {several(weights)} but no {CONFIG}, the only file with rank, scaling and targets",
            f"copy {CONFIG} from the training output; PEFT's save_pretrained writes both files",
        )
    if model:
        which = "config.json" if "config.json" in names else "model_index.json"
        return UnreadableFile(
            f"`{path}` is the folder of a model, not of an adapter: it has a {which} and no {CONFIG}",
            "pass the folder that PEFT's save_pretrained wrote, and the model with --model",
        )
    others = [entry for entry in entries if like_weights(entry.name)]
    if len(others) == 1:
        return lone_file(others[0])
    if below := _below(path):
        return _in_subfolders(path, below)
    hint = "pass the folder that PEFT's save_pretrained wrote"
    return UnreadableFile(f"`{path}` is not an adapter folder: it has no {CONFIG}", hint)


def _stays(entry: Path) -> bool:
    """Whether an entry is not a link that leads out of its folder: the content of such a file is not looked at."""
    try:
        return not entry.is_symlink() or entry.resolve().is_relative_to(storage_of(entry.parent.resolve()))
    # A cycle of links is a RuntimeError.
    except (OSError, RuntimeError):
        return False


def _in_subfolders(path: Path, folders: Sequence[Path]) -> UnreadableFile:
    which = several([str(folder.relative_to(path)) for folder in folders])
    hint = f"pass `{folders[0]}`"
    if len(folders) > 1:
        hint += f"\nto check all {len(folders)} adapters: {command('check', path, '--recursive')}"
    return UnreadableFile(f"`{path}` is not an adapter folder: {CONFIG} is not in it but in {which}", hint)


def _below(path: Path) -> list[Path]:
    """The adapter folders further down."""
    adapters = []
    for number, (folder, subfolders, files) in enumerate(os.walk(path)):
        subfolders.sort()
        if CONFIG in files:
            adapters.append(Path(folder))
        if number == _MOST_FOLDERS:
            break
    return adapters


def _is_trace(entries: Iterable[Path]) -> bool:
    """Whether a folder holds a trace: its own document, or the folder of a process with one."""
    documents = (entry if entry.name == _RUN else entry / _PROCESS for entry in entries)
    return any(document.is_file() and _has_schema(document) for document in documents)


def _has_schema(path: Path) -> bool:
    try:
        return "schema" in read_json(path)
    except ProbeError:
        return False


def _config_copy(path: Path, entries: Iterable[Path]) -> UnreadableFile | None:
    copies = [entry for entry in entries if CONFIG_COPY.fullmatch(entry.name) and entry.is_file()]
    for copy in copies:
        try:
            other = not_peft(read_json(copy))
        except ProbeError:
            continue
        more = f"; there are {len(copies)} copies, check which one is right" if len(copies) > 1 else ""
        return UnreadableFile(
            f"`{path}` holds {shown(copy.name)} but no {CONFIG}, the only config that loaders read",
            f"rename it to {CONFIG}{more}" if other is None else other.hint,
        )
    return None


def _foreign(start: str, entries: Sequence[Path]) -> MissingWeights | None:
    """The error for a folder with weights of another library. It begins with `start`."""
    from lora_probe.adapter.foreign import foreign_file

    candidates = [entry for entry in entries if like_weights(entry.name) and entry.is_file() and _stays(entry)]
    for entry in candidates[:_READ_FIRST]:
        if (other := foreign_file(entry)) is not None:
            return MissingWeights(f"{start}: {shown(entry.name)} {other.what}", other.hint)
    return None


def no_weights(folder: Path, entries: Sequence[Path]) -> MissingWeights:
    """The error for a folder with a config, whose `entries` have no name that loaders look for."""
    names = [entry.name for entry in entries]
    start = f"`{folder}` holds {CONFIG} but no {WEIGHTS}"
    folders = [entry for entry in entries if entry.is_dir() and any(os.path.lexists(entry / name) for name in LOADED)]
    if folders:
        return MissingWeights(
            f"{start}: the weights are in the subfolder {several([sub.name for sub in folders])}, "
            "where no loader looks",
            f"pass `{folders[0]}`"
            if (folders[0] / CONFIG).exists()
            else f"move the weights out of `{folders[0]}`; PEFT saves adapters with a name other than `default` there",
        )
    if (foreign := _foreign(start, entries)) is not None:
        return foreign
    if shards := [name for name in names if SHARD.fullmatch(name)]:
        return MissingWeights(
            f"{start}: the weights are in shards ({several(shards)}), and no loader accepts a sharded adapter",
            f"merge their tensors into one file, {WEIGHTS}"
            if len([name for name in shards if not name.endswith(".json")]) != 1
            else f"rename it to adapter_model{Path(shards[0]).suffix}",
        )
    if copies := [name for name in names if COPY.fullmatch(name)]:
        suffix = Path(copies[0]).suffix.lower()
        return MissingWeights(
            f"{start}: no loader looks for {several(copies)}, named like a duplicate download or a copy",
            f"rename it to adapter_model{suffix}"
            + (f"; there are {len(copies)} copies, check which one is right" if len(copies) > 1 else ""),
        )
    for name, (origin, hint) in BY_OTHERS.items():
        if name in names:
            return MissingWeights(f"{start}: no loader of PEFT adapters looks for {name}, {origin}", hint)
    if others := [name for name in names if like_weights(name)]:
        return MissingWeights(
            f"{start}: no loader looks for {several(others)}",
            f"rename {shown(others[0])} to {_named_for_loaders(others[0])} if it holds the adapter",
        )
    return MissingWeights(f"{start} and no other file that could be weights", "save or download the adapter again")


def _named_for_loaders(name: str) -> str:
    """The name under which loaders look for a file of this name's type."""
    return f"adapter_model.{'safetensors' if name.lower().endswith('.safetensors') else 'bin'}"


def several(names: Sequence[str]) -> str:
    """The first names in words, and how many more there are."""
    head = ", ".join(shown(name) for name in names[:4])
    return head if len(names) <= 4 else f"{head} and {len(names) - 4} more"
