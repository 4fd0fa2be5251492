"""LP2xx: the files of an adapter as a whole. In: a `Subject`. Out: `AdapterFinding`s."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from lora_probe.adapter import AdapterModule, adapter_in
from lora_probe.base import checkpoint
from lora_probe.base import engine_view as view
from lora_probe.errors import ProbeError
from lora_probe.files import brief, shown
from lora_probe.files.json_object import read_json
from lora_probe.files.weights import TensorHeader, read_chunk
from lora_probe.names import PREFIX, layer_of, ranges
from lora_probe.rules.registry import AdapterFinding, Family, rule, survey

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

FAMILY = Family("LP2", "the weights file", commands="check, some also by trace", loading_step=2)

EMBEDDINGS = (*checkpoint.EMBEDDINGS, *view.LM_HEADS)
"""What modules of input embeddings and of output heads are called."""


@rule(
    "LP207",
    "weights-not-found",
    "adapter",
    "absent",
    hint="put adapter_model.safetensors beside adapter_config.json: no loader looks anywhere else",
)
def weights_not_found(message: str) -> str:
    """There is a config, and the weights are not where the loaders look.

    What it does: looks for adapter_model.safetensors and adapter_model.bin, and, where they are not, for what may be
    meant: a sub-folder, shards, the names that browsers give to downloads.

    Why it matters: vLLM 0.32 says `doesn't contain tensors`; PEFT 0.21 goes on to ask the hub for a repository of
    that name. PEFT itself saves an adapter that is not called `default` into a sub-folder.

    Example: `adapter_model (5).bin`, `default/adapter_model.safetensors`. References: unslothai/unsloth#1191.

    Mend: move or rename the file.
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
    """The weights file is damaged, or not what its name promises.

    What it does: reads the header bounded, and checks every shape, dtype and offset against the file before a value is
    read. Pickles go through torch's weights-only loader, which executes nothing.

    Why it matters: vLLM 0.32 and PEFT 0.21 both fail, with words that name no cause: a Git LFS pointer of 130 bytes
    is `header too large`, a file cut short is `incomplete metadata`.

    Mend: `git lfs pull`, or copy it again. References: codefuse-ai/MFTCoder#20, microsoft/OmniParser#34.
    """
    return message


@survey(
    "LP209",
    "no-pairs",
    hint="save the adapter again; with ZeRO-3 or FSDP gather the weights first",
)
def no_pairs(subject: Subject) -> Iterator[AdapterFinding]:
    """The file holds no LoRA pair at all.

    Why it matters: training went well and nothing of it was saved: a state dict that was filtered twice, a rank without
    the weights. vLLM 0.32 dies with a StopIteration that has no text; PEFT 0.21 warns of missing keys and serves the
    base.

    References: huggingface/peft#286, huggingface/trl#4416.
    """
    if subject.adapter.modules:
        return
    path = subject.adapter.weights.path
    tensors = len(subject.adapter.weights.tensors)
    what = "no tensor" if not tensors else f"{tensors} tensors, none of them half of a LoRA pair"
    yield AdapterFinding(f"the file holds {what}", engines=("vllm",), refuses=True, path=path)
    yield AdapterFinding(f"the file holds {what}: PEFT serves the base", engines=("peft",), path=path)


@survey(
    "LP210",
    "tensor-that-vllm-refuses",
    engines=("vllm",),
    hint="vLLM applies A and B of linear layers, and embeddings where its class says so: merge to serve the rest",
)
def refused_tensor(subject: Subject) -> Iterator[AdapterFinding]:
    """The file holds a tensor that is not half of a pair, and vLLM's loader refuses the file for it.

    What it does: mirrors `parse_fine_tuned_lora_name`: names must end in lora_A.weight, lora_B.weight,
    lora_embedding_A or lora_embedding_B; a classification head and copies of embeddings are let through.

    Why it matters: vLLM 0.32 refuses (`... is unsupported LoRA weight`), loudly. People then delete the tensors to get
    past it, and lose that part of the training in silence. 0.31 alone takes a bias of lora_B, and drops it.

    Example: magnitude vectors of DoRA, trained embeddings and heads (modules_to_save), trained tokens, biases.
    References: vllm-project/vllm#10849, #9280, #36501.
    """
    tensors = subject.adapter.weights.tensors
    refused = [name for name in tensors if not _vllm_parses(name, subject) and adapter_in(tensors[name]) is None]
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        yield AdapterFinding(
            f"`{shown(refused[0])}`{more} is unsupported LoRA weight", refuses=True, path=subject.adapter.weights.path
        )


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
    hint="take the adapter's name out of the keys: `lora-probe check --fix` does it",
    fixable=True,
)
def adapter_name_in_keys(subject: Subject) -> Iterator[AdapterFinding]:
    """The keys carry the name that the adapter had in the live model: `lora_A.default.weight`.

    Why it matters: the state dict of the model was saved in place of PEFT's `save_pretrained`. vLLM ({vllm})
    refuses it (`... is unsupported LoRA weight`). PEFT 0.21 loads `default`, which is what it calls an adapter unless
    told otherwise, and drops any other name without a word.

    Mend: save with `save_pretrained`, or rename the keys.
    """
    named = {tensor.name: name for tensor in subject.adapter.weights.tensors.values() if (name := adapter_in(tensor))}
    if not named:
        return
    first, more = next(iter(named.items())), f" (and {len(named) - 1} more)" if len(named) > 1 else ""
    said = f"`{shown(first[0])}`{more} holds the adapter's name `{shown(first[1])}`"
    yield AdapterFinding(said, engines=("vllm",), refuses=True, path=subject.adapter.weights.path)
    dropped = tuple(
        pair.key
        for pair in subject.adapter.modules
        if any(named.get(tensor.name, "default") != "default" for tensor in (pair.a, pair.b) if tensor is not None)
    )
    if dropped:
        yield AdapterFinding(said, dropped, "read", "absent", engines=("peft",), path=subject.adapter.weights.path)


@survey(
    "LP216",
    "module-twice",
    hint="keep one of the two: the engines do not agree on which one counts",
)
def module_twice(subject: Subject) -> Iterator[AdapterFinding]:
    """Two tensors of the file are the same half of the same module.

    What it does: where their values differ, vLLM's modules are called wrong.

    Why it matters: vLLM ({vllm}) takes the last one that it reads, PEFT 0.21 the one with `base_model.model.`.

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
        f"`{shown(twice[0].tensor.name)}`{more}: another tensor of the file is the same half",
        keys=tuple(dict.fromkeys(wrong)),
        value="wrong" if wrong else "ok",
        engines=("vllm",) if wrong else (),
        path=subject.adapter.weights.path,
    )


def _merged_by_vllm(subject: Subject) -> Iterator[AdapterFinding]:
    """Pairs of several names that are one module to vLLM: it takes every `base_model.model.` out of a name."""
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
            f"`{shown(first[0].stored_as)}` and `{shown(first[1].stored_as)}` are one module to vLLM, "
            + "which takes the last"
            + (f" (and {len(several) - 1} more such)" if len(several) > 1 else ""),
            keys=keys,
            value="wrong" if keys else "ok",
            engines=("vllm",),
            path=subject.adapter.weights.path,
        )


def _place_in_file(pair: AdapterModule) -> int:
    return max(tensor.start for tensor in pair.tensors)


def _same(subject: Subject, pairs: list[AdapterModule]) -> bool:
    one, *others = pairs
    halves = [(one.a, other.a) for other in others] + [(one.b, other.b) for other in others]
    return all(mine is not None and other is not None and _equal(subject, mine, other) for mine, other in halves)


def name_of(tensor: TensorHeader) -> str:
    return tensor.name.removeprefix(PREFIX)


def _equal(subject: Subject, one: TensorHeader, other: TensorHeader) -> bool:
    file = subject.adapter.weights
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    starts = range(0, one.parameters, CHUNK)
    ends = ((start, min(start + CHUNK, one.parameters)) for start in starts)
    return all(np.array_equal(read_chunk(file, one, *end), read_chunk(file, other, *end)) for end in ends)


CHUNK = 2**20
"""Values that are compared at once."""


@survey(
    "LP217",
    "gap-in-layers",
    severity="warning",
    hint="give the base with --model to be sure; save the adapter again if the layer was trained",
)
def gap_in_layers(subject: Subject) -> Iterator[AdapterFinding]:
    """Layers between others have no pair in the file. Asked only where the base is not known; else LP204 is sure.

    What it does: looks for gaps in the layer numbers that no layers_to_transform, no expression and no regular step
    (hybrid models adapt every fourth layer) explains.

    Why it matters: a shard or a pipeline stage was not saved. vLLM ({vllm}) serves the base there and says
    nothing.
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
        yield AdapterFinding(f"layers {having} have pairs, {lacking} between them have none")


@survey(
    "LP218",
    "not-the-best-step",
    severity="info",
    hint="nothing to mend if this is the one you mean to serve",
)
def not_the_best(subject: Subject) -> Iterator[AdapterFinding]:
    """trainer_state.json beside the adapter says that another checkpoint was the best, or that training went on.

    Why it matters: neither engine reads a step number, so a checkpoint of the middle of a run is served in silence.

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
        yield AdapterFinding(f"this is step {brief(step)} of a training of {brief(last)}", path=path)
