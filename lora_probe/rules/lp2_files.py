"""LP2xx: the files of an adapter as a whole. In: a `Subject`. Out: `AdapterFinding`s."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from lora_probe.adapter import Adapter, AdapterModule, adapter_in
from lora_probe.base import checkpoint
from lora_probe.base import engine_view as view
from lora_probe.errors import ProbeError
from lora_probe.files import brief, shown
from lora_probe.files.json_object import read_json
from lora_probe.files.values import read_chunk
from lora_probe.files.weights import TensorHeader
from lora_probe.names import PREFIX, Key, layer_of, ranges
from lora_probe.rules.paths import RENAME
from lora_probe.rules.registry import AdapterFinding, Family, rule, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

FAMILY = Family("LP2", "the weights file", commands="check, some also by trace", loading_step=2)

EMBEDDINGS = (*checkpoint.EMBEDDINGS, *view.LM_HEADS)
"""Names of modules that are input embeddings or output heads."""


@rule(
    "LP207",
    "weights-not-found",
    "adapter",
    "absent",
    hint="put adapter_model.safetensors next to adapter_config.json: loaders do not look anywhere else",
)
def weights_not_found(message: str) -> str:
    """The folder has a config, but the weights are not where loaders look.

    What it does: looks for adapter_model.safetensors and adapter_model.bin. If neither exists, it looks for likely
    candidates: a sub-folder, shards, names that browsers give to downloads.

    Why it matters: vLLM 0.32 reports `doesn't contain tensors`; PEFT 0.21 then looks for a repository of that name on
    the hub. PEFT itself saves an adapter into a sub-folder if its name is not `default`.

    Example: `adapter_model (5).bin`, `default/adapter_model.safetensors`.

    Fix: move or rename the file.

    References: unslothai/unsloth#1191.
    """
    return message


@rule(
    "LP208",
    "weights-unreadable",
    "adapter",
    "absent",
    hint="copy or download the file again",
)
def weights_unreadable(message: str) -> str:
    """The weights file is damaged, or its content does not match its extension.

    What it does: reads the header within size limits, and checks every shape, dtype and offset against the file before
    any value is read. Pickles are read with torch's weights-only loader, which does not execute code.

    Why it matters: vLLM 0.32 and PEFT 0.21 both fail, and their messages do not give the cause: a Git LFS pointer of
    130 bytes is `header too large`, a truncated file is `incomplete metadata`.

    Fix: run `git lfs pull`, or copy the file again.

    References: codefuse-ai/MFTCoder#20, microsoft/OmniParser#34.
    """
    return message


@survey(
    "LP209",
    "no-pairs",
    hint="save the adapter again; with ZeRO-3 or FSDP, gather the weights first",
    explains=("LP204", "LP210", "LP211", "LP212"),
)
def no_pairs(subject: Subject) -> Iterator[AdapterFinding]:
    """The file does not hold any LoRA pair.

    Why it matters: the training is not in the file: the state dict was filtered twice, or a rank without the weights
    saved it. vLLM 0.32 fails with a StopIteration without a message; PEFT 0.21 warns of missing keys and serves the
    base model.

    References: huggingface/peft#286, huggingface/trl#4416.
    """
    if subject.adapter.modules:
        return
    path = subject.adapter.weights.path
    tensors = len(subject.adapter.weights.tensors)
    some = "1 tensor, which is not" if tensors == 1 else f"{tensors} tensors, none of them"
    what = f"{some} half of a LoRA pair" if tensors else "no tensors"
    yield AdapterFinding(f"the file holds {what}", refused_by=("vllm",), path=path)


@survey(
    "LP210",
    "tensor-that-vllm-refuses",
    engines=("vllm",),
    hint="merge the adapter: vLLM applies only A and B of linear layers, and of embeddings for some model classes",
)
def refused_tensor(subject: Subject) -> Iterator[AdapterFinding]:
    """The file holds a tensor that is not half of a pair, so vLLM's loader refuses the file.

    What it does: repeats `parse_fine_tuned_lora_name`: names must end in lora_A.weight, lora_B.weight,
    lora_embedding_A or lora_embedding_B; a classification head and copies of embeddings are allowed.

    Why it matters: vLLM 0.32 refuses the file (`... is unsupported LoRA weight`). Users then often delete the tensors
    to get past the error, and silently lose that part of the training. vLLM 0.31 is the only version that accepts a
    bias of lora_B, and it drops it.

    Example: magnitude vectors of DoRA, trained embeddings and heads (modules_to_save), trained tokens, biases.

    References: vllm-project/vllm#10849, #9280, #36501.
    """
    tensors = subject.adapter.weights.tensors
    refused = [name for name in tensors if not _vllm_parses(name, subject) and adapter_in(tensors[name]) is None]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        halves = {half.name for pair in subject.adapter.modules for half in (pair.a, pair.b) if half is not None}
        strange = {other.tensor.name for other in subject.adapter.others if not other.understood}
        hint = RENAME if halves.issuperset(refused) else STRANGE if strange.issuperset(refused) else ""
        yield AdapterFinding(
            f"`{shown(refused[0])}`{more} is unsupported LoRA weight",
            keys=_keys_of(subject.adapter, refused),
            hint=hint,
            refuses=True,
            path=subject.adapter.weights.path,
        )


STRANGE = "remove these tensors from the file, if they are not part of the adapter: PEFT does not know them either"


def _keys_of(adapter: Adapter, names: list[str]) -> tuple[Key, ...]:
    """The pairs that tensors belong to; none if one of them does not belong to a pair."""
    owners = {tensor.name: pair.key for pair in adapter.modules for tensor in pair.tensors}
    return tuple(dict.fromkeys(owners[name] for name in names)) if owners.keys() >= set(names) else ()


def _vllm_parses(name: str, subject: Subject) -> bool:
    if name.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
        return True
    vllm = subject.views.get("vllm")
    if vllm is not None and vllm.skips(name):
        return True
    parts = name.split(".")
    if parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
        return True
    if len(parts) < 2 or parts[-1] not in ("weight", "bias"):
        return False
    if parts[-2] in ("lora_A", "lora_B"):
        return parts[-1] == "weight" or subject.serving.vllm.drops_bias_of_b
    return parts[-2] in view.CLASSIFIER_HEADS and subject.serving.vllm.classification_heads


@survey(
    "LP219",
    "adapter-name-in-keys",
    hint="remove the adapter's name from the keys: `lora-probe check --fix -o FIXED/` does it",
    fixable=True,
)
def adapter_name_in_keys(subject: Subject) -> Iterator[AdapterFinding]:
    """The keys contain the adapter's name from the live model: `lora_A.default.weight`.

    Why it matters: the state dict of the model was saved instead of the output of PEFT's `save_pretrained`. vLLM
    ({vllm}) refuses the file (`... is unsupported LoRA weight`). PEFT 0.21 loads keys with `default`, its standard
    adapter name, and silently drops any other name.

    Fix: save with `save_pretrained`, or rename the keys.
    """
    named = {tensor.name: name for tensor in subject.adapter.weights.tensors.values() if (name := adapter_in(tensor))}
    if not named:
        return
    first, more = next(iter(named.items())), f" (and {len(named) - 1} more)" if len(named) > 1 else ""
    message = f"`{shown(first[0])}`{more} contains the adapter's name `{shown(first[1])}`"
    dropped = tuple(
        pair.key
        for pair in subject.adapter.modules
        if any(named.get(tensor.name, "default") != "default" for tensor in (pair.a, pair.b) if tensor is not None)
    )
    engines, path = ("peft", "vllm") if dropped else ("vllm",), subject.adapter.weights.path
    yield AdapterFinding(message, dropped, "read", "absent", engines, refused_by=("vllm",), path=path)


@survey(
    "LP222",
    "integer-weights",
    severity="warning",
    hint="save the adapter again in the dtype of the training: no engine reads the scale of a quantised tensor",
)
def integer_weights(subject: Subject) -> Iterator[AdapterFinding]:
    """A or B holds integers.

    Why it matters: PEFT 0.21 and vLLM 0.32 convert every dtype to that of the model and report nothing. For 8-bit
    floats that is right. Integers are usually quantised weights, which mean nothing without their scale.
    """
    whole = [
        tensor
        for pair in subject.adapter.modules
        for tensor in (pair.a, pair.b)
        if tensor is not None and tensor.dtype[:1] in "IUB" and tensor.dtype != "BF16"
    ]
    if whole:
        more = f" (and {len(whole) - 1} more)" if len(whole) > 1 else ""
        message = f"`{shown(whole[0].name)}`{more} has dtype {whole[0].dtype}; engines convert it as it is"
        yield AdapterFinding(message, path=subject.adapter.weights.path)


@survey(
    "LP216",
    "module-twice",
    hint="keep one of the two: engines differ in which one they use",
    explains=("LP214",),
)
def module_twice(subject: Subject) -> Iterator[AdapterFinding]:
    """Two tensors of the file are the same half of the same module.

    What it does: if their values differ, marks the modules as wrong in vLLM.

    Why it matters: vLLM ({vllm}) uses the last one that it reads, PEFT 0.21 the one with `base_model.model.`.

    Example: a script that saved the adapter with and without the prefix into one file.
    """
    yield from _merged_by_vllm(subject)
    twice = [other for other in subject.adapter.others if other.of_pair]
    if not twice:
        return
    halves = {name_of(t): (pair.key, t) for pair in subject.adapter.modules for t in (pair.a, pair.b) if t is not None}
    wrong = []
    for other in twice:
        key, kept = halves.get(name_of(other.tensor), (None, other.tensor))
        if key is not None and not _equal(subject, kept, other.tensor):
            wrong.append(key)
    more = f" and {len(twice) - 1} more" if len(twice) > 1 else ""
    yield AdapterFinding(
        f"`{shown(twice[0].tensor.name)}`{more}: the file has another tensor for the same half",
        keys=tuple(dict.fromkeys(wrong)),
        value="wrong" if wrong else "ok",
        engines=("vllm",) if wrong else (),
        path=subject.adapter.weights.path,
    )


def _merged_by_vllm(subject: Subject) -> Iterator[AdapterFinding]:
    """Pairs of several names that are the same module to vLLM: it removes every `base_model.model.` from a name."""
    groups: dict[str, list[AdapterModule]] = {}
    for pair in subject.adapter.modules:
        place = subject.places["vllm"][pair.key] if "vllm" in subject.places else None
        if place is not None and place.name is not None:
            groups.setdefault(f"{place.name} {pair.parameter}", []).append(pair)
    several = [pairs for pairs in groups.values() if len(pairs) > 1]
    if several:
        first = several[0]
        keys = tuple(
            pair.key
            for pairs in several
            if not _same(subject, pairs)
            for pair in sorted(pairs, key=_place_in_file)[:-1]
        )
        yield AdapterFinding(
            f"`{shown(first[0].stored_as)}` and `{shown(first[1].stored_as)}` are the same module to vLLM, "
            + "which uses the last one"
            + (f" (and {len(several) - 1} more cases)" if len(several) > 1 else ""),
            keys=keys,
            value="wrong" if keys else "ok",
            engines=("vllm",),
            path=subject.adapter.weights.path,
        )


def _place_in_file(pair: AdapterModule) -> int:
    return max(tensor.start for tensor in pair.tensors)


def _same(subject: Subject, pairs: list[AdapterModule]) -> bool:
    first, *others = pairs
    halves = [(first.a, other.a) for other in others] + [(first.b, other.b) for other in others]
    return all(a is not None and b is not None and _equal(subject, a, b) for a, b in halves)


def name_of(tensor: TensorHeader) -> str:
    return tensor.name.removeprefix(PREFIX)


def _equal(subject: Subject, first: TensorHeader, second: TensorHeader) -> bool:
    file = subject.adapter.weights
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    starts = range(0, first.parameters, CHUNK)
    ends = ((start, min(start + CHUNK, first.parameters)) for start in starts)
    return all(np.array_equal(read_chunk(file, first, *end), read_chunk(file, second, *end)) for end in ends)


CHUNK = 2**20
"""Number of values compared at once."""


@survey(
    "LP217",
    "gap-in-layers",
    severity="warning",
    hint="pass the base model with --model to be sure; save the adapter again if the layer was trained",
)
def gap_in_layers(subject: Subject) -> Iterator[AdapterFinding]:
    """Some layers between others have no pair in the file. Checked only if the base model is unknown; otherwise LP204
    is exact.

    What it does: looks for gaps in the layer numbers that are not explained by layers_to_transform, by a regular
    expression or by a regular step (hybrid models adapt every fourth layer).

    Why it matters: a shard or a pipeline stage was not saved. vLLM ({vllm}) silently serves the base model in these
    layers.
    """
    config = subject.adapter.config
    plain = isinstance(config.target_modules, tuple) and not any("." in name for name in config.target_modules)
    if subject.shapes is not None or not plain or config.raw.get("layers_to_transform") is not None:
        return
    layers = sorted({layer for pair in subject.adapter.modules if (layer := layer_of(pair.module)) is not None})
    steps = {after - before for before, after in pairwise(layers)}
    if len(layers) < 3 or len(steps) <= 1:
        return
    if layers[-1] - layers[0] + 1 - len(layers) <= len(layers) // 2:
        gaps = sorted(set(range(layers[0], layers[-1])) - set(layers))
        having, lacking = (shown(ranges(numbers)) for numbers in (layers, gaps))
        yield AdapterFinding(f"layers {having} have pairs; missing between them: {lacking}")


@survey(
    "LP218",
    "not-the-best-step",
    severity="info",
    hint="ignore this if it is the checkpoint that you want to serve",
)
def not_the_best(subject: Subject) -> Iterator[AdapterFinding]:
    """trainer_state.json next to the adapter shows that another checkpoint was better, or that training continued.

    Why it matters: engines do not read a step number, so a checkpoint from the middle of a run is served silently.

    References: huggingface/sentence-transformers#3470.
    """
    path = subject.adapter.path / "trainer_state.json"
    try:
        state = read_json(path) if path.is_file() and not path.is_symlink() else {}
    except ProbeError:
        return
    best, step, last = state.get("best_model_checkpoint"), state.get("global_step"), state.get("max_steps")
    here = subject.adapter.path.resolve().name
    if isinstance(best, str) and best and here.startswith("checkpoint-") and best.rstrip("/").split("/")[-1] != here:
        yield AdapterFinding(
            f"the trainer's best checkpoint is `{shown(best.rstrip('/').split('/')[-1])}`, this is `{shown(here)}`",
            path=path,
        )
    elif isinstance(step, int) and isinstance(last, int) and 0 < step < last:
        yield AdapterFinding(f"this is step {brief(step)} of {brief(last)} training steps", path=path)
