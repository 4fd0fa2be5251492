"""Finds an adapter on disk: its folder, and the files in it that loaders read.

In: a path. Out: the folder with `adapter_config.json`, and the file with the weights. If the weights have a name or a
place that no loader looks for, the error names them and says what to rename.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_probe.errors import MissingWeights, UnreadableFile
from lora_probe.files import shown, storage_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE, VLLM_PICKLE = "adapter_model.bin", "adapter_model.pt"
LOADED = (WEIGHTS, PICKLE, VLLM_PICKLE)
"""The names that loaders look for, in order. PEFT accepts the first two, vLLM all three."""

_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json")
_COPY = re.compile(r"adapter_model\s*(?:\(\d+\)|- copy|copy)?\s*(?:\(\d+\))?\.(safetensors|bin|pt)", re.IGNORECASE)
_OTHERS: dict[str, tuple[str, str]] = {
    "adapters.safetensors": (
        "MLX's name",
        "convert it; renaming is not enough, because MLX stores lora_a and lora_b transposed",
    ),
    "adapters.npz": ("MLX's name", "convert it; MLX stores lora_a and lora_b transposed"),
    "pytorch_lora_weights.safetensors": ("diffusers' name", f"load it with diffusers; PEFT reads {WEIGHTS}"),
    "pytorch_adapter.bin": ("AdapterHub's name", "load it with the adapters library; PEFT reads another format"),
    "model.safetensors": ("the name of a whole model", "serve it without an adapter if it is a merged model"),
    "pytorch_model.bin": ("the name of a whole model", f"rename it to {PICKLE} if it holds lora_A and lora_B"),
}
_WEIGHTS_LIKE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state.*|scaler|random_states.*)\.(bin|pt|pth)")


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


def _find(path: Path) -> tuple[Path, tuple[str, ...]]:
    if not path.exists():
        raise UnreadableFile(f"folder `{path}` does not exist", "pass the folder with adapter_config.json")
    if not path.is_dir():
        raise UnreadableFile(f"`{path}` is a file, not an adapter folder", f"pass its folder: `{path.parent}`")
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
    raise _no_config(path, folders, [entry.name for entry in entries])


def _no_config(path: Path, folders: list[Path], names: list[str]) -> UnreadableFile:
    if folders:
        which = _several([folder.name for folder in folders])
        return UnreadableFile(
            f"`{path}` is not an adapter folder: {CONFIG} is not in it but in {which}",
            f"pass `{folders[0]}`",
        )
    weights = [name for name in names if name in LOADED or _SHARD.fullmatch(name) or _COPY.fullmatch(name)]
    if weights:
        return UnreadableFile(
            f"`{path}` holds {_several(weights)} but no {CONFIG}, the only file with rank, scaling and targets",
            f"copy {CONFIG} from the training output; PEFT's save_pretrained writes both files",
        )
    if "config.json" in names:
        return UnreadableFile(
            f"`{path}` is the folder of a model, not of an adapter: it has a config.json and no {CONFIG}",
            "pass the folder that PEFT's save_pretrained wrote, and the model with --model",
        )
    hint = "pass the folder that PEFT's save_pretrained wrote"
    return UnreadableFile(f"`{path}` is not an adapter folder: it has no {CONFIG}", hint)


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
        raise _missing(folder, [entry for entry in listed(folder) if entry.name != CONFIG])
    path, rest = inside(folder, names[0]), names[1:]
    notes = []
    if names[0] == VLLM_PICKLE:
        notes.append(f"only vLLM reads {VLLM_PICKLE}; PEFT looks for {WEIGHTS} and {PICKLE}")
    if rest:
        notes.append(f"{_several(rest)} {'is' if len(rest) == 1 else 'are'} ignored: loaders read {names[0]} first")
    return path, tuple(notes)


def _missing(folder: Path, entries: list[Path]) -> MissingWeights:
    names = [entry.name for entry in entries]
    start = f"`{folder}` holds {CONFIG} but no {WEIGHTS}"
    folders = [entry for entry in entries if entry.is_dir() and any(os.path.lexists(entry / name) for name in LOADED)]
    if folders:
        return MissingWeights(
            f"{start}: the weights are in the subfolder {_several([sub.name for sub in folders])}, "
            "where no loader looks",
            f"pass `{folders[0]}`"
            if (folders[0] / CONFIG).exists()
            else f"move the weights out of `{folders[0]}`; PEFT saves adapters with a name other than `default` there",
        )
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        return MissingWeights(
            f"{start}: the weights are in shards ({_several(shards)}), and no loader accepts a sharded adapter",
            f"merge their tensors into one file, {WEIGHTS}"
            if len([name for name in shards if not name.endswith(".json")]) != 1
            else f"rename it to adapter_model{Path(shards[0]).suffix}",
        )
    if copies := [name for name in names if _COPY.fullmatch(name)]:
        suffix = Path(copies[0]).suffix.lower()
        return MissingWeights(
            f"{start}: no loader looks for {_several(copies)}, named like a duplicate download or a copy",
            f"rename it to adapter_model{suffix}"
            + (f"; there are {len(copies)} copies, check which one is right" if len(copies) > 1 else ""),
        )
    for name, (origin, hint) in _OTHERS.items():
        if name in names:
            return MissingWeights(f"{start}: no loader of PEFT adapters looks for {name}, {origin}", hint)
    others = [name for name in names if name.endswith(_WEIGHTS_LIKE) and not _NOT_WEIGHTS.fullmatch(name)]
    if others:
        like = others[0]
        to = "safetensors" if like.endswith(".safetensors") else "bin"
        return MissingWeights(
            f"{start}: no loader looks for {_several(others)}",
            f"rename {shown(like)} to adapter_model.{to} if it holds the adapter",
        )
    return MissingWeights(f"{start} and no other file that could be weights", "save or download the adapter again")


def _several(names: list[str]) -> str:
    head = ", ".join(shown(name) for name in names[:4])
    return head if len(names) <= 4 else f"{head} and {len(names) - 4} more"
