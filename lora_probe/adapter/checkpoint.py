"""An adapter checkpoint on disk: `Adapter` and its `AdapterModule`s.

In: a folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`, or vLLM's `.pt`), or a training
output folder. Out: the config, and every tensor of the file in exactly one place: half of a module's pair, an extra
of a module, or `others` with the reason why it is not LoRA. Values are read lazily; only a `.bin` needs torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.adapter.config import AdapterConfig, open_config
from lora_probe.adapter.file_names import CONFIG, WEIGHTS
from lora_probe.adapter.folder import find_checkpoint as find_checkpoint
from lora_probe.adapter.folder import inside, listed, weights_path
from lora_probe.adapter.variants import EXTRAS
from lora_probe.errors import ForeignWeights
from lora_probe.files import is_text, sha256
from lora_probe.files.limits import step
from lora_probe.files.weights import TensorHeader, WeightsFile, open_weights
from lora_probe.names import PREFIX, Key, natural
from lora_probe.presented import Presented

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_PAIR = re.compile(
    r"^(?P<path>.+)\.(?P<half>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?$"
)
_NAMES = "|".join(
    re.escape(extra.name) + (r"\.\w+" if extra.in_parts else r"(?:\.weight)?") for extra in EXTRAS.values()
)
_EXTRA = re.compile(rf"^(?P<path>.+)\.(?:{_NAMES})$")

FROZEN = ".original_module."
"""What PEFT adds to the names of the original beside a module that is trained as a whole. The original is not used."""


@dataclass(frozen=True)
class AdapterModule:
    """One pair of the file. `A: [r, in]`, `B: [out, r]`; for an embedding `A: [r, vocabulary]`, for a convolution
    `A: [r, in, *kernel]`, `B: [out, r, 1, ...]`.

    `module` is `stored_as` (the path in the file) without PEFT's prefix and with fused experts resolved.
    """

    module: str
    stored_as: str
    a: TensorHeader | None
    b: TensorHeader | None
    config_rank: int
    scaling: float
    parameter: str = "weight"
    expert: int | None = None
    embedding: bool = False
    extras: tuple[TensorHeader, ...] = ()
    blocks: tuple[int, int] = (1, 1)
    """How many blocks of A and of B are stored, of a matrix with those on its diagonal and zeros around (BD-LoRA)."""

    @property
    def key(self) -> Key:
        return self.module, self.parameter, self.expert

    @property
    def pattern_name(self) -> str:
        """The name that the keys of rank_pattern and alpha_pattern are matched against."""
        return _pattern_name(self.module, self.parameter)

    @property
    def rank(self) -> int | None:
        """The rank of the tensors, which may differ from the config's."""
        if self.a is not None and self.a.shape:
            return self.a.shape[0]
        return self.rank_of_b

    @property
    def rank_of_b(self) -> int | None:
        """The rank of B alone."""
        return self.b.shape[1] * self.blocks[1] if self.b is not None and len(self.b.shape) > 1 else None

    @property
    def inputs(self) -> int | None:
        """The features that A multiplies."""
        return self.a.shape[-1] * self.blocks[0] if self.a is not None and self.a.shape else None

    @property
    def matrices(self) -> bool:
        """Whether A and B are matrices of one rank."""
        if self.a is None or self.b is None:
            return False
        halves = zip((self.a, self.b), self.blocks, strict=True)
        plain = all(len(t.shape) == 2 and 0 not in t.shape and t.shape[0] % blocks == 0 for t, blocks in halves)
        return plain and self.a.shape[0] == self.rank_of_b

    @property
    def convolution(self) -> bool:
        """Whether A and B are the kernels of PEFT's LoRA layer for a convolution, and of one rank."""
        if self.a is None or self.b is None or 0 in self.a.shape or 0 in self.b.shape:
            return False
        same = len(self.a.shape) == len(self.b.shape) and 3 <= len(self.a.shape) <= 5
        return same and set(self.b.shape[2:]) == {1} and self.a.shape[0] == self.b.shape[1]

    @property
    def tensors(self) -> tuple[TensorHeader, ...]:
        return tuple(t for t in (self.a, self.b) if t is not None) + self.extras


@dataclass(frozen=True)
class OtherTensor:
    """A tensor of the file that is not half of a LoRA pair, and what it is instead. `of_pair`: it would be half of one
    that another tensor of the file is half of already."""

    tensor: TensorHeader
    what: str
    understood: bool
    of_pair: bool = False


@dataclass(frozen=True, repr=False)
class Adapter(Presented):
    """One adapter folder, or an adapter that was pushed into an engine (`pushed.py`). `files` are the names in the
    folder that belong to neither config nor weights."""

    path: Path
    config: AdapterConfig
    weights: WeightsFile
    modules: tuple[AdapterModule, ...]
    others: tuple[OtherTensor, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())
    content: str = ""
    """The digest of an adapter that was pushed into an engine as tensors; empty for one that has files."""

    @property
    def source(self) -> str:
        """What holds its tensors, for messages."""
        return "the pushed tensors" if self.content else "the file"

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.weights.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({tensor.dtype for tensor in self.weights.tensors.values()}))

    def digest(self) -> str:
        """SHA-256 of config and weights together: the content hash of a load."""
        return self.content or sha256(self.config.path)[:32] + sha256(self.weights.path)[:32]

    def values(self, tensor: TensorHeader) -> npt.NDArray[np.float32]:
        from lora_probe.files.values import read

        return read(self.weights, tensor)

    def by_key(self) -> dict[Key, AdapterModule]:
        return {module.key: module for module in self.modules}


def open_adapter(path: str | Path) -> Adapter:
    """Open an adapter folder, or the last checkpoint of a training output folder.

    Raises:
        NotLora: it is the config of something other than a LoRA adapter; or ForeignWeights: the weights are.
        MissingWeights: there is a config, but no weights where loaders look.
        UnreadableFile: the folder, the config or the weights are missing or damaged.
    """
    folder, notes = find_checkpoint(Path(path))
    config = open_config(inside(folder, CONFIG))
    file, more = weights_path(folder)
    weights = _weights(file)
    step("sorting the tensors", file)
    modules, others = sort_tensors(weights.tensors, config)
    if not modules:
        _refuse_foreign(file, weights)
    used = {CONFIG, file.name}
    files = tuple(_text(entry.name) for entry in listed(folder) if entry.name not in used)
    return Adapter(folder, config, weights, modules, others, files, notes + more)


def _refuse_foreign(file: Path, weights: WeightsFile) -> None:
    """Raises ForeignWeights: they are those of another kind of adapter, or of a model."""
    from lora_probe.adapter.foreign import foreign_tensors

    if (other := foreign_tensors(weights.tensors, weights.metadata)) is not None:
        raise ForeignWeights(f"`{file}` {other.what}", other.hint)


def _weights(file: Path) -> WeightsFile:
    if file.name == WEIGHTS:
        return open_weights(file)
    from lora_probe.files.pickled import open_pickle

    return open_pickle(file)


def _text(name: str) -> str:
    """A file's name as text; the bytes of some names are not valid UTF-8."""
    return name if is_text(name) else name.encode(errors="surrogateescape").decode(errors="replace")


def sort_tensors(
    tensors: dict[str, TensorHeader], config: AdapterConfig
) -> tuple[tuple[AdapterModule, ...], tuple[OtherTensor, ...]]:
    """The pairs that the tensors of an adapter form, and the tensors that are not half of one."""
    halves: dict[str, dict[str, TensorHeader]] = {}
    extras: dict[str, list[TensorHeader]] = {}
    others: list[OtherTensor] = []
    # Of two tensors for the same half PEFT uses the one with its prefix, so names as PEFT saves them come first.
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (not item[0].startswith(PREFIX), bool(adapter_in(item[1])))
    ):
        path = name.removeprefix(PREFIX)
        if FROZEN in path:
            others.append(OtherTensor(tensor, "of the frozen copy of a module that is trained as a whole", True))
        elif match := _PAIR.match(path):
            pair = halves.setdefault(match["path"], {})
            half = match["half"]
            if half[-1] in (taken[-1] for taken in pair):
                what = f"another tensor of the file is {half} of the same module"
                others.append(OtherTensor(tensor, what, False, of_pair=True))
            else:
                pair[half] = tensor
        elif match := _EXTRA.match(path):
            extras.setdefault(match["path"], []).append(tensor)
        else:
            others.append(_other(path, tensor, config))
    for path in extras.keys() - halves.keys():
        others.extend(OtherTensor(t, "belongs to a module without lora_A and lora_B", False) for t in extras[path])
    modules = [_module(path, pair, extras.get(path, []), config) for path, pair in halves.items()]
    return tuple(sorted(modules, key=lambda m: natural(m.stored_as))), tuple(others)


def _module(
    path: str, pair: dict[str, TensorHeader], extras: list[TensorHeader], config: AdapterConfig
) -> AdapterModule:
    module, parameter = _expert_parameter(path, config)
    pattern_name = _pattern_name(module, parameter)
    embedding = any(half.startswith("lora_embedding") for half in pair)
    return AdapterModule(
        module=module,
        stored_as=path,
        a=pair.get("lora_A") or pair.get("lora_embedding_A"),
        b=pair.get("lora_B") or pair.get("lora_embedding_B"),
        config_rank=config.rank_of(pattern_name),
        scaling=config.scaling_of(pattern_name),
        parameter=parameter,
        embedding=embedding,
        extras=tuple(extras),
        blocks=(1, 1) if embedding else config.blocks.of(pattern_name),
    )


def _pattern_name(module: str, parameter: str) -> str:
    return module if parameter == "weight" else f"{module}.{parameter}"


def _expert_parameter(path: str, config: AdapterConfig) -> tuple[str, str]:
    """The module and the parameter of a path: fused experts are parameters (`target_parameters`).

    PEFT wraps one parameter inside the other (`ParamWrapper`): gate_up_proj is stored as `<module>.base_layer`,
    down_proj as `<module>`; vLLM's `PEFTHelper.get_rank_and_scaling` reads them the same way.
    """
    module = path.removesuffix(".base_layer")
    parameters = config.targets.parameters_of(module)
    if not parameters:
        return path, "weight"
    if len(parameters) == 1:
        return module, parameters[0]
    return module, "gate_up_proj" if path != module else "down_proj"


def _other(path: str, tensor: TensorHeader, config: AdapterConfig) -> OtherTensor:
    module, _, last = path.rpartition(".")
    trained = config.raw.get("bias")
    # A bias of an adapted layer is stored under `base_layer`, which PEFT has put around it.
    if last == "bias" and trained in ("all", "lora_only") and not config.targets.saves(module):
        return OtherTensor(tensor, f"a trained bias (bias: {trained})", True)
    if "trainable_tokens" in path:
        return OtherTensor(tensor, "trained tokens (trainable_token_indices)", True)
    if ".base_layer." in path:
        return OtherTensor(tensor, "a tensor of the base model", True)
    if last in ("weight", "bias") and "lora" not in path:
        return OtherTensor(tensor, "a whole parameter (modules_to_save)", True)
    return OtherTensor(tensor, "not understood", False)


def adapter_in(tensor: TensorHeader) -> str | None:
    """The name of an adapter inside a tensor's name, as in a live PEFT model: `lora_A.default.weight`."""
    match = _PAIR.match(tensor.name)
    return match["adapter"] if match else None
