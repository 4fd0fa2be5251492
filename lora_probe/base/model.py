"""The base model on disk: its `config.json` and the names and shapes of its weights.

In: a folder, or the id of a model in the local Hugging Face cache. Out: `Base`. Only headers are read. A base
without safetensors files has no `shapes`, and rules that need them are not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_probe.errors import ModelNotFound, TooLarge, UnreadableFile
from lora_probe.files import brief, hub, shown
from lora_probe.files.json_object import read_json
from lora_probe.files.weights import open_weights
from lora_probe.precision import FLOATS

OPTIONS = {"base model": "--model", "merged model": "--merged"}
"""The role of a model, and the option that sets it."""
LARGEST = {("layer", "layers"): 1_000, ("expert", "experts"): 10_000, ("vocab_size",): 10_000_000}
"""Limits for keys of `config.json` with these endings; no model has more. The largest known models have about 200
layers, 512 experts and a vocabulary of a million."""
MOST_EXPERTS = 500_000
"""Limit for the experts of all layers together; the largest known model has 23,000."""


@dataclass(frozen=True)
class Base:
    """A base model. `shapes` maps the path of each module with a matrix to `(out, in)`, None if the file does not show
    it (a quantised weight)."""

    path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, int] | None]

    @property
    def architecture(self) -> str:
        """The first class in the config's `architectures`; empty if there is none."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else None
        return first if isinstance(first, str) else ""

    @property
    def text(self) -> Mapping[str, Any]:
        """The config of the language model: for a multimodal model, the outer config updated with the inner one."""
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, dict) else self.config


def open_base(name: str) -> Base:
    """Open a base model by folder or by id.

    Raises:
        ModelNotFound: neither a folder nor a model in the local cache.
        UnreadableFile: the folder is not a model folder, or one of its files is damaged.
    """
    folder = find_model(name)
    config = read_json(folder / "config.json")
    _require_real_sizes(folder / "config.json", config)
    shapes: dict[str, tuple[int, int] | None] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in open_weights(file).tensors.values():
            module, _, parameter = tensor.name.rpartition(".")
            if parameter == "weight" and len(tensor.shape) == 2:
                plain = tensor.dtype in FLOATS
                shapes[module] = (tensor.shape[0], tensor.shape[1]) if plain else None
            elif parameter in ("qweight", "weight_packed"):
                shapes[module] = None
    return Base(folder, config, shapes)


def _require_real_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """Check the sizes in the config, because an engine would allocate whatever it asks for.

    Raises:
        TooLarge: more layers, experts or words than any model has.
    """
    most = dict.fromkeys(LARGEST, 0.0)
    waiting: list[tuple[str, object]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value if isinstance(inner, dict | list)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for ends in (ends for ends in LARGEST if key.endswith(ends)):
                if value > LARGEST[ends]:
                    raise _unreal(path, f"`{shown(key)}` is {brief(value)}", LARGEST[ends])
                most[ends] = max(most[ends], value)
    layers, experts, _ = most.values()
    if layers * experts > MOST_EXPERTS:
        raise _unreal(path, f"{layers:g} layers of {experts:g} experts", MOST_EXPERTS)


def _unreal(path: Path, what: str, most: int) -> TooLarge:
    return TooLarge(
        f"`{path}`: {what}, but no model has more than {most:,}",
        "set it to the number that the model has; no engine is started with this one",
    )


def find_model(name: str, *, role: str = "base model") -> Path:
    """The folder of a model that is passed as a folder or an id. Raises as `open_base` does.

    `role` is "base model" or "merged model": error messages name it and its option.
    """
    option = OPTIONS[role]
    local = Path(name)
    try:
        exists, folder, configured = local.exists(), local.is_dir(), (local / "config.json").exists()
    except OSError as error:
        raise UnreadableFile(
            f"cannot read `{name}`: {error.strerror or error}", f"pass the {role} with {option}"
        ) from error
    if folder:
        if not configured:
            raise UnreadableFile(
                f"`{name}` is not a model folder: it has no config.json", f"pass the {role} with {option}"
            )
        return local
    if exists:
        raise UnreadableFile(
            f"`{name}` is a file, but a {role} is a folder", f"pass its folder with {option}: `{local.parent}`"
        )
    cached = _cached(name)
    if cached is None:
        raise ModelNotFound(
            f"{role} `{name}` was not found: it is neither a folder nor a model in {hub.cache()}",
            f"pass a folder or a cached model with {option}",
        )
    return cached


def _cached(name: str) -> Path | None:
    """The newest snapshot in the cache, if it is one of a model."""
    folder = hub.snapshot(name)
    return folder if folder is not None and (folder / "config.json").exists() else None
