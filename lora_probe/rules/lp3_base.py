"""LP3xx: the whole adapter compared with its base model. In: a `Subject` with a base. Out: `AdapterFinding`s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_probe.adapter.checkpoint import FROZEN
from lora_probe.base.engine_view import CLASSIFIER_HEADS
from lora_probe.files import brief, shown
from lora_probe.names import PREFIX, Key, Universe, layer_of, name_modules, projection_of
from lora_probe.rules.lp2_files import EMBEDDINGS
from lora_probe.rules.paths import RENAME, listed
from lora_probe.rules.registry import AdapterFinding, Family, survey
from lora_probe.rules.stored import rows_of

if TYPE_CHECKING:
    from lora_probe.rules.subject import Subject

FAMILY = Family("LP3", "the base model", commands="check, some also by trace", loading_step=3)


@survey(
    "LP306",
    "unexpected-module",
    engines=("vllm",),
    needs="vllm",
    hint="merge the adapter, or train without this module: vLLM's model class cannot adapt it",
    follows=("LP301",),
)
def unexpected_module(subject: Subject) -> Iterator[AdapterFinding]:
    """The last part of a pair's name is not a module that vLLM's model class adapts, so vLLM refuses the file.

    What it does: repeats `check_unexpected_modules` with the module names of the model class.

    Why it matters: vLLM 0.32 refuses the file (`expected target modules in {...} but received [...]`). The same recipe
    may work on another model: a pair on `lm_head` or `embed_tokens` loads on Llama and is refused on Qwen2, whose
    class does not list embeddings; fused names (`qkv_proj`) are refused if the class expects q, k and v.

    References: arcee-ai/mergekit#459, vllm-project/vllm#21500.
    """
    view = subject.views["vllm"]
    if not view.suffixes:
        return
    expected = set(view.suffixes)
    names: list[str] = []
    keys: list[Key] = []
    for pair in subject.adapter.modules:
        name = subject.places["vllm"][pair.key].name
        if name is None or any("base_layer" in tensor.name for tensor in pair.tensors):
            continue
        word = name[name.find(".experts") + 1 :] if ".experts" in name else projection_of(name)
        if word not in expected:
            names.append(name)
            keys.append(pair.key)
    frozen = [name for name in subject.adapter.weights.tensors if FROZEN in name and ".lora_" in name]
    names += [path for name in frozen if (path := name[: name.rindex(".lora_")]).rpartition(".")[2] not in expected]
    saved = set(subject.adapter.config.raw.get("modules_to_save") or ())
    for name in subject.adapter.weights.tensors:
        parts = name.split(".")
        if (
            len(parts) > 1
            and parts[-1] in ("weight", "bias")
            and parts[-2] in CLASSIFIER_HEADS
            and parts[-2] not in saved
        ):
            names.append(parts[-2])
    if names:
        words = sorted(map(shown, expected))
        more = f" and {len(words) - MOST_WORDS} more" if len(words) > MOST_WORDS else ""
        adapts = f"{shown(view.model)} adapts {', '.join(words[:MOST_WORDS])}{more}"
        pairs = tuple(keys) if len(keys) == len(names) else ()
        meant = {row.entry.key for row in rows_of(subject) if row.entry is not None and row.module != row.entry.module}
        hint = RENAME if pairs and meant.issuperset(pairs) else ""
        yield AdapterFinding(f"{adapts}; the file has {listed(names, 3)}", keys=pairs, refuses=True, hint=hint)


MOST_WORDS = 30
"""Module names of a class that a message lists; real classes have ten."""


@survey(
    "LP307",
    "not-adaptable-in-peft",
    engines=("peft",),
    needs="base",
    hint="remove the module from target_modules, or adapt its parameters with target_parameters",
)
def not_adaptable_in_peft(subject: Subject) -> Iterator[AdapterFinding]:
    """The config targets a type of module that PEFT cannot adapt.

    Why it matters: PEFT 0.21 refuses the adapter (`Target module ... is not supported`). With transformers 5 the
    experts of a mixture are one module with fused parameters, and its router is not a Linear any more: names that
    worked before fail.

    Example: `target_modules=["mlp"]`.
    """
    view = subject.views.get("peft")
    if view is None:
        return
    config = subject.adapter.config
    if config.target_modules == "all-linear":
        return
    bad = [
        name
        for name in config.targeted(view.modules)
        if view.modules[name].why_not and not config.targets_parameter(f"{name}.weight")
    ]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        why = view.modules[bad[0]].why_not
        yield AdapterFinding(f"the config targets `{shown(bad[0])}`{more}: {why}", refuses=True, field="target_modules")


@survey(
    "LP308",
    "vocabulary-differs",
    needs="base",
    hint="resize the base model's embeddings as in training, or serve the base model with the added tokens",
    follows=("LP301",),
    explains=("LP210",),
)
def vocabulary_differs(subject: Subject) -> Iterator[AdapterFinding]:
    """Embeddings or heads in the file have a different number of tokens than the base model.

    What it does: compares whole embeddings and heads, and pairs on them, with the vocabulary of the base model.

    Why it matters: tokens were added before training. PEFT 0.21 reports a size mismatch until the base model is
    resized as well; vLLM 0.32 has no room for more tokens (`embedding LoRA size(260) must be consistent with the base
    model's vocabulary size(250)`), and always refuses whole embeddings.

    References: huggingface/peft#838, huggingface/peft#1457.
    """
    sizes = {view.vocabulary for view in subject.views.values() if view.vocabulary is not None}
    if len(sizes) != 1:
        return
    (size,) = sizes
    for name, tensor in subject.adapter.weights.tensors.items():
        path = name.removeprefix(PREFIX)
        word = path.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        tokens = None
        if word in EMBEDDINGS and ".lora_" not in path and len(tensor.shape) == 2:
            tokens = tensor.shape[0]
        elif path.endswith("lora_embedding_A") and len(tensor.shape) == 2 and word_of(path) in EMBEDDINGS:
            tokens = tensor.shape[1]
        if tokens is not None and tokens != size:
            pair = path.endswith("lora_embedding_A")
            # PEFT drops a pair that the config does not target.
            targeted = not pair or bool(subject.adapter.config.targeted([path.removesuffix(".lora_embedding_A")]))
            engines = (("peft",) if targeted else ()) + (("vllm",) if pair else ())
            yield AdapterFinding(
                f"`{shown(name)}` has {tokens} tokens, the base model has {size}",
                engines=engines,
                refuses=True,
                path=subject.adapter.weights.path,
            )
            return


def word_of(path: str) -> str:
    """The last part of the name of the module that a half of a pair belongs to."""
    return path[: path.rindex(".lora_")].rpartition(".")[2]


@survey(
    "LP309",
    "experts-incomplete",
    engines=("vllm",),
    needs="vllm",
    hint="train all experts and all of their projections, or serve with PEFT",
)
def experts_incomplete(subject: Subject) -> Iterator[AdapterFinding]:
    """Some experts, or some of their projections, have no pair.

    What it does: counts the pairs of each layer's experts and compares the number with what vLLM packs together.

    Why it matters: vLLM 0.32 fails with an AssertionError without a message (`pack_moe`). For two fused parameters
    (gate_up_proj, down_proj) both pairs are needed as well.

    References: sgl-project/sglang#32406, unslothai/unsloth#6936.
    """
    view = subject.views["vllm"]
    resolved = {place.name for place in subject.places["vllm"].values() if place.name is not None}
    groups: dict[str, list[str]] = {}
    for name, module in view.modules.items():
        if module.kind == "experts":
            groups.setdefault(name[: name.find(".experts")], []).append(name)
    for layer, names in groups.items():
        wanted = [f"{layer}.experts", f"{layer}.experts.base_layer"] if view.experts == "3d" else names
        missing = [name for name in wanted if name not in resolved]
        if missing and len(missing) < len(wanted):
            experts, held = f"`{shown(f'{layer}.experts')}`", len(wanted) - len(missing)
            yield AdapterFinding(
                f"{experts} has {held} of the {len(wanted)} pairs that vLLM packs together; "
                f"missing: {name_modules(missing, Universe(tuple(view.modules)))}",
                refuses=True,
            )
            return


@survey(
    "LP310",
    "experts-in-the-other-layout",
    engines=("vllm",),
    needs="vllm",
    hint="start vLLM with --enable-mixed-moe-lora-format, and set is_3d_lora_weight in the request",
)
def experts_layout(subject: Subject) -> Iterator[AdapterFinding]:
    """The file adapts the experts' fused parameters, but vLLM's model class adapts each expert separately.

    Why it matters: vLLM 0.32 refuses the file (`contains fused 3D MoE weights ... but the model uses a 2D MoE LoRA
    wrapper`); up to 0.31 it fails without a message. PEFT with transformers 5 writes only the fused layout.

    References: vllm-project/vllm#52194, #41384.
    """
    view = subject.views["vllm"]
    fused = [place.name for place in subject.places["vllm"].values() if place.name and place.name.endswith(".experts")]
    if fused and view.experts == "2d":
        message = (
            f"`{shown(fused[0])}` holds fused experts, but vLLM's {shown(view.model)} adapts each expert separately"
        )
        yield AdapterFinding(message, refuses=True)


@survey(
    "LP311",
    "keys-are-values",
    severity="warning",
    engines=("vllm",),
    needs="base",
    hint="compare both engines with `lora-probe trace` and `lora-probe compare`, or train without k_proj",
)
def keys_are_values(subject: Subject) -> Iterator[AdapterFinding]:
    """The base model computes its values from k_proj in some layers, and the adapter adapts k_proj.

    Why it matters: Transformers uses one k_proj for keys and values, so an adapter on it changes both. vLLM copies the
    base model's keys into both slices of qkv_proj, but adds the adapter's part to the keys only. Known from the source
    of both (vLLM 0.32, transformers 5.19), not measured.

    Example: Gemma 4 with `attention_k_eq_v`.

    References: vllm-project/vllm#47026.
    """
    assert subject.base is not None
    if subject.base.text.get("attention_k_eq_v") and any(
        projection_of(p.module) == "k_proj" for p in subject.adapter.modules
    ):
        yield AdapterFinding("the base model's config sets `attention_k_eq_v`, and the adapter adapts k_proj")


@survey(
    "LP316",
    "shared-keys-and-values",
    severity="info",
    needs="base",
    hint="ignore this: these tensors have no effect in any engine",
)
def shared_keys(subject: Subject) -> Iterator[AdapterFinding]:
    """The last layers of the base model reuse keys and values of earlier layers, and the adapter has pairs for theirs.

    Why it matters: these layers have no such modules, so both engines drop the pairs (LP303); the pairs were never
    trained either.

    References: vllm-project/vllm#54917.
    """
    assert subject.base is not None
    text = subject.base.text
    shared, layers = text.get("num_kv_shared_layers"), text.get("num_hidden_layers")
    if not isinstance(shared, int) or not isinstance(layers, int) or shared <= 0:
        return
    pairs = [
        pair
        for pair in subject.adapter.modules
        if projection_of(pair.module) in ("k_proj", "v_proj") and (layer_of(pair.module) or 0) >= layers - shared
    ]
    if pairs:
        yield AdapterFinding(
            f"the last {brief(shared)} of {brief(layers)} layers reuse keys and values of earlier layers; "
            f"the file has {len(pairs)} pairs for their k_proj and v_proj",
            keys=tuple(pair.key for pair in pairs),
        )
