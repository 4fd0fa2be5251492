"""Where an adapter lies: the folder that is meant, and the files of it that loaders read.

In: a path that somebody gave. Out: the folder with `adapter_config.json`, and the file that holds the weights. Where
weights lie under a name or in a place in which no loader looks, the error says which, and what to rename.
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
"""The names that loaders look for, in their order. PEFT takes the first two, vLLM all three."""

_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.(safetensors|bin)|adapter_model\.(safetensors|bin)\.index\.json")
_COPY = re.compile(r"adapter_model\s*(?:\(\d+\)|- copy|copy)?\s*(?:\(\d+\))?\.(safetensors|bin|pt)", re.IGNORECASE)
_OTHERS: dict[str, tuple[str, str]] = {
    "adapters.safetensors": (
        "MLX's name",
        "convert it: MLX stores lora_a and lora_b transposed, renaming is not enough",
    ),
    "adapters.npz": ("MLX's name", "convert it: MLX stores lora_a and lora_b transposed"),
    "pytorch_lora_weights.safetensors": ("diffusers' name", f"load it with diffusers; PEFT reads {WEIGHTS}"),
    "pytorch_adapter.bin": ("AdapterHub's name", "load it with the adapters library; PEFT reads another format"),
    "model.safetensors": ("the name of a whole model", "is the model merged already? then serve it by itself"),
    "pytorch_model.bin": ("the name of a whole model", f"if it holds lora_A and lora_B, rename it to {PICKLE}"),
}
_WEIGHTS_LIKE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state.*|scaler|random_states.*)\.(bin|pt|pth)")


def find_checkpoint(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The adapter folder that `path` stands for, and a note where a choice was made.

    Raises:
        UnreadableFile: it is none, with what it is instead.
    """
    try:
        return _find(path)
    # A path too long, a NUL in it, a folder that may not be entered.
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UnreadableFile(f"cannot look at `{shown(str(path), 300)}`: {why}") from error


def _find(path: Path) -> tuple[Path, tuple[str, ...]]:
    if not path.exists():
        raise UnreadableFile(f"there is no folder `{path}`", "give the folder that holds adapter_config.json")
    if not path.is_dir():
        raise UnreadableFile(f"`{path}` is a file, not an adapter folder", f"give its folder: `{path.parent}`")
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
        return checkpoints[-1], (f"`{path}` holds {names}; this is the last, {checkpoints[-1].name}",)
    raise _no_config(path, folders, [entry.name for entry in entries])


def _no_config(path: Path, folders: list[Path], names: list[str]) -> UnreadableFile:
    if folders:
        which = _several([folder.name for folder in folders])
        return UnreadableFile(
            f"`{path}` holds no {CONFIG}: it is not an adapter folder, {which} in it {_are(folders)}",
            f"try `{folders[0]}`",
        )
    weights = [name for name in names if name in LOADED or _SHARD.fullmatch(name) or _COPY.fullmatch(name)]
    if weights:
        return UnreadableFile(
            f"`{path}` holds no {CONFIG} beside {_several(weights)}: rank, scaling and targets are in no other file",
            f"copy {CONFIG} from where the adapter was trained; PEFT's save_pretrained writes both",
        )
    if "config.json" in names:
        return UnreadableFile(
            f"`{path}` holds no {CONFIG}: it is not an adapter folder but a model's",
            "give the folder that PEFT's save_pretrained wrote; the model is --model",
        )
    hint = "give the folder that PEFT's save_pretrained wrote"
    return UnreadableFile(f"`{path}` holds no {CONFIG}: it is not an adapter folder", hint)


def listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UnreadableFile(f"cannot list `{folder}`: {error.strerror or error}") from error


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, refused when a symbolic link leads out of the folder's own storage, or nowhere.

    A Hugging Face cache links `snapshots/<commit>/<file>` to `blobs/` of the same repository: that is inside.
    """
    path = folder / name
    if not path.is_symlink():
        return path
    try:
        target, home = path.resolve(), folder.resolve()
    # Python says RuntimeError where a link leads in a circle.
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "a circle of links"
        raise UnreadableFile(
            f"`{path}` is a symbolic link that leads nowhere: {why}", "put the file itself in its place"
        ) from error
    if not target.is_relative_to(storage_of(home)):
        raise UnreadableFile(
            f"`{path}` is a symbolic link that leads out of its folder, to `{target}`",
            "copy the file into the folder if you trust it",
        )
    if not path.exists():
        raise UnreadableFile(
            f"`{path}` is a symbolic link to `{target}`, which is not there",
            "put the file itself in its place, or download it again",
        )
    return path


def weights_path(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The file that loaders read the weights from, and what is to be noted about the choice.

    Raises:
        MissingWeights: there is none under a name that a loader knows, with what lies there instead.
        UnreadableFile: it is a symbolic link out of the folder.
    """
    there = [name for name in LOADED if os.path.lexists(folder / name)]
    if not there:
        raise _missing(folder, [entry for entry in listed(folder) if entry.name != CONFIG])
    path, rest = inside(folder, there[0]), there[1:]
    notes = []
    if there[0] == VLLM_PICKLE:
        notes.append(f"{VLLM_PICKLE} is read by vLLM alone: PEFT looks for {WEIGHTS} and {PICKLE}")
    if rest:
        notes.append(
            f"{_several(rest)} {'lies' if len(rest) == 1 else 'lie'} beside {there[0]}, and no loader reads it"
        )
    return path, tuple(notes)


def _missing(folder: Path, entries: list[Path]) -> MissingWeights:
    names = [entry.name for entry in entries]
    say = f"`{folder}` holds {CONFIG} and no {WEIGHTS}"
    homes = [entry for entry in entries if entry.is_dir() and any(os.path.lexists(entry / name) for name in LOADED)]
    if homes:
        whose = [home.name for home in homes]
        return MissingWeights(
            f"{say}: the weights are in the sub-folder {_several(whose)}, where no loader looks",
            f"give `{homes[0]}`"
            if (homes[0] / CONFIG).exists()
            else f"move the weights out of `{homes[0]}`; PEFT saves an adapter that is not called `default` there",
        )
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        return MissingWeights(
            f"{say}: the weights are in shards ({_several(shards)}), and no loader takes an adapter in shards",
            f"join their tensors in one file, {WEIGHTS}"
            if len([name for name in shards if not name.endswith(".json")]) != 1
            else f"rename it to adapter_model{Path(shards[0]).suffix}",
        )
    if copies := [name for name in names if _COPY.fullmatch(name)]:
        suffix = Path(copies[0]).suffix.lower()
        return MissingWeights(
            f"{say}: {_several(copies)} is a name that a browser or a copy gave, and no loader looks for it",
            f"rename it to adapter_model{suffix}"
            + (f"; of the {len(copies)} copies, look which one is meant" if len(copies) > 1 else ""),
        )
    for name, (whose_name, hint) in _OTHERS.items():
        if name in names:
            return MissingWeights(
                f"{say}: {name}, {whose_name}, is not looked for by any loader of PEFT adapters", hint
            )
    others = [name for name in names if name.endswith(_WEIGHTS_LIKE) and not _NOT_WEIGHTS.fullmatch(name)]
    if others:
        like = others[0]
        to = "safetensors" if like.endswith(".safetensors") else "bin"
        return MissingWeights(
            f"{say}: no loader looks for {_several(others)}",
            f"if {shown(like)} holds the adapter, rename it to adapter_model.{to}",
        )
    return MissingWeights(
        f"{say}, nor anything else that could be weights", "was the save or the download cut short? save it again"
    )


def _several(names: list[str]) -> str:
    head = ", ".join(shown(name) for name in names[:4])
    return head if len(names) <= 4 else f"{head} and {len(names) - 4} more"


def _are(folders: list[Path]) -> str:
    return "is one" if len(folders) == 1 else "are"
