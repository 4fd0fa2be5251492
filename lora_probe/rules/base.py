"""LP3xx: the adapter as a whole against its base. In: a `Case` with a base. Out: `Found`s."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_probe.adapter import PREFIX, layer_of, projection_of
from lora_probe.alignment import alignments
from lora_probe.config import read_json
from lora_probe.errors import ProbeError
from lora_probe.rules import Found, survey
from lora_probe.rules.files import EMBEDDINGS, HEADS
from lora_probe.rules.serving import CHANGES_BASE

if TYPE_CHECKING:
    from lora_probe.base import Base
    from lora_probe.case import Case

QUANTISED = ("bnb-4bit", "bnb-8bit", "-4bit", "-8bit", "awq", "gptq", "fp8", "int4", "int8", "nf4", "w4a16", "mxfp4")
"""What the names of quantised models end in, or hold."""


@survey(
    "LP306",
    "unexpected-module",
    engines=("vllm",),
    needs="vllm",
    hint="vLLM's class has no such module to adapt: merge the adapter, or train without it",
)
def unexpected_module(case: Case) -> Iterator[Found]:
    """The last word of a pair's name is none that vLLM's class of the model adapts, and vLLM refuses the file.

    What it does: mirrors `check_unexpected_modules` with the words that the class itself gives.

    Why it matters: vLLM 0.32 refuses loudly (`expected target modules in {...} but received [...]`). The same recipe
    may work on another model: a pair on `lm_head` or `embed_tokens` loads on Llama and is refused on Qwen2, whose
    class names no embeddings; fused names (`qkv_proj`) are refused where the class takes q, k and v.

    References: arcee-ai/mergekit#459, vllm-project/vllm#21500.
    """
    view = case.views["vllm"]
    if not view.suffixes:
        return
    expected = set(view.suffixes)
    names = []
    for pair in case.adapter.modules:
        name = case.places["vllm"][pair.key].name
        if name is None or any("base_layer" in tensor.name for tensor in pair.tensors):
            continue
        word = name[name.find(".experts") + 1 :] if ".experts" in name else projection_of(name)
        if word not in expected:
            names.append(name)
    saved = [str(name) for name in case.adapter.config.raw.get("modules_to_save") or ()]
    for name in case.adapter.weights.tensors:
        parts = name.split(".")
        if len(parts) > 1 and parts[-1] in ("weight", "bias") and parts[-2] in HEADS and parts[-2] not in saved:
            names.append(parts[-2])
    if names:
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield Found(f"{view.model} adapts {', '.join(sorted(expected))}; the file has {shown}", refuses=True)


@survey(
    "LP307",
    "not-adaptable-in-peft",
    engines=("peft",),
    needs="base",
    hint="take the module out of target_modules, or adapt its parameters with target_parameters",
)
def not_adaptable_in_peft(case: Case) -> Iterator[Found]:
    """The config targets a module of a kind that PEFT cannot adapt.

    Why it matters: PEFT 0.21 refuses (`Target module ... is not supported`). With transformers 5 the experts of a
    mixture are one module with fused parameters, and its router is no Linear any more: names that worked before do not.

    Example: `target_modules=["mlp"]`.
    """
    view = case.views.get("peft")
    if view is None:
        return
    config = case.adapter.config
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
        yield Found(f"the config targets `{bad[0]}`{more}: {why}", refuses=True, field="target_modules")


@survey(
    "LP308",
    "vocabulary-differs",
    needs="base",
    hint="resize the base's embeddings as in training, or serve the base that the tokens were added to",
)
def vocabulary_differs(case: Case) -> Iterator[Found]:
    """Embeddings or heads in the file have another number of tokens than the base.

    What it does: compares whole embeddings and heads, and pairs on them, with the base's vocabulary.

    Why it matters: tokens were added before training. PEFT 0.21 says size mismatch until the base is resized as well;
    vLLM 0.32 has no room for more tokens (`embedding LoRA size(260) must be consistent with the base model's vocabulary
    size(250)`), and refuses whole embeddings in any case.

    References: huggingface/peft#838, huggingface/peft#1457.
    """
    sizes = {view.vocabulary for view in case.views.values() if view.vocabulary is not None}
    if len(sizes) != 1:
        return
    (size,) = sizes
    for name, tensor in case.adapter.weights.tensors.items():
        path = name.removeprefix(PREFIX)
        word = path.removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        tokens = None
        if word in EMBEDDINGS and ".lora_" not in path and len(tensor.shape) == 2:
            tokens = tensor.shape[0]
        elif path.endswith("lora_embedding_A") and len(tensor.shape) == 2:
            tokens = tensor.shape[1]
        if tokens is not None and tokens != size:
            engines = ("peft", "vllm") if path.endswith("lora_embedding_A") else ("peft",)
            yield Found(
                f"`{name}` is for {tokens} tokens, the base has {size}",
                engines=engines,
                refuses=True,
                path=case.adapter.weights.path,
            )
            return


@survey(
    "LP309",
    "experts-incomplete",
    engines=("vllm",),
    needs="vllm",
    hint="train all experts and all of their projections, or serve with PEFT",
)
def experts_incomplete(case: Case) -> Iterator[Found]:
    """Some experts, or some of their projections, have no pair.

    What it does: counts the pairs of each layer's experts against those that vLLM packs together.

    Why it matters: vLLM 0.32 dies with an AssertionError that has no text (`pack_moe`). With two fused parameters
    (gate_up_proj, down_proj) both are needed as well.

    References: sgl-project/sglang#32406, unslothai/unsloth#6936.
    """
    view = case.views["vllm"]
    found = {place.name for place in case.places["vllm"].values() if place.name is not None}
    groups: dict[str, list[str]] = {}
    for name, module in view.modules.items():
        if module.kind == "experts":
            groups.setdefault(name[: name.find(".experts")], []).append(name)
    for layer, names in groups.items():
        held = [name for name in names if name in found]
        if view.experts == "3d":
            held = [name for name in (f"{layer}.experts", f"{layer}.experts.base_layer") if name in found]
        wanted = 2 if view.experts == "3d" else len(names)
        if held and len(held) < wanted:
            yield Found(f"`{layer}.experts` has {len(held)} of {wanted} pairs that vLLM packs together", refuses=True)
            return


@survey(
    "LP310",
    "experts-in-the-other-layout",
    engines=("vllm",),
    needs="vllm",
    hint="start vLLM with --enable-mixed-moe-lora-format, and say is_3d_lora_weight in the request",
)
def experts_layout(case: Case) -> Iterator[Found]:
    """The file adapts the experts' fused parameters, and vLLM's class adapts each expert by itself.

    Why it matters: vLLM 0.32 refuses (`contains fused 3D MoE weights ... but the model uses a 2D MoE LoRA wrapper`);
    up to 0.31 it fails without words. PEFT with transformers 5 writes nothing but the fused layout.

    References: vllm-project/vllm#52194, #41384.
    """
    view = case.views["vllm"]
    fused = [place.name for place in case.places["vllm"].values() if place.name and place.name.endswith(".experts")]
    if fused and view.experts == "2d":
        yield Found(f"`{fused[0]}` holds fused experts, and vLLM's {view.model} takes them one by one", refuses=True)


@survey(
    "LP311",
    "keys-are-values",
    severity="warning",
    engines=("vllm",),
    needs="base",
    hint="compare both engines with `lora-probe trace` and `lora-probe compare`, or leave k_proj out",
)
def keys_are_values(case: Case) -> Iterator[Found]:
    """The base computes its values from k_proj in some layers, and the adapter adapts k_proj.

    Why it matters: Transformers takes one k_proj for keys and values, so an adapter on it changes both; vLLM copies the
    base's keys into both slices of qkv_proj and the adapter's part into the keys alone. Read in both sources (vLLM
    0.32, transformers 5.19), not run.

    Example: Gemma 4 with `attention_k_eq_v`. References: vllm-project/vllm#47026.
    """
    assert case.base is not None
    if _text(case.base).get("attention_k_eq_v") and any(
        projection_of(p.module) == "k_proj" for p in case.adapter.modules
    ):
        yield Found("the base's config says `attention_k_eq_v`, and the adapter adapts k_proj")


@survey(
    "LP312",
    "another-base",
    severity="warning",
    needs="base",
    hint="serve it on the base that it was trained on; names and shapes cannot tell two models of one kind apart",
)
def another_base(case: Case) -> Iterator[Found]:
    """The base that is given calls itself otherwise than the base that the config names.

    What it does: compares the last word of `base_model_name_or_path` with what the base's own config says that it is
    (`_name_or_path`), where both say something. A folder's name proves nothing and is not compared.

    Why it matters: an adapter of the instruct model loads on the base model, or on another fine-tune, without a word in
    either engine; answers are poor.

    References: predibase/lorax#58, predibase/lorax#311.
    """
    assert case.base is not None
    named, own = case.adapter.config.base_model, case.base.config.get("_name_or_path")
    if not named or not isinstance(own, str) or not own or Path(own).is_absolute() or Path(named).is_absolute():
        return
    words = [word.rstrip("/").split("/")[-1].lower() for word in (named, own)]
    plain = [_without_quantisation(word) for word in words]
    if plain[0] and plain[1] and plain[0] != plain[1]:
        yield Found(f"the adapter names `{named}`, the base calls itself `{own}`", field="base_model_name_or_path")


@survey(
    "LP313",
    "trained-on-quantised-base",
    severity="warning",
    hint="serve the same quantised base, or check the answers against PEFT on it: `lora-probe compare`",
)
def trained_on_quantised(case: Case) -> Iterator[Found]:
    """The config names a quantised base, and the base that is given is not quantised that way.

    What it does: reads the quantisation out of the name of the base in the adapter's config, and holds it against
    `quantization_config` in the base's own. Without a base it says what to look at, as a note.

    Why it matters: the adapter learned to make up for the rounding of the quantised weights. On 16-bit weights, or on
    another quantisation, it runs in both engines without a word, weaker or worse than in training.

    Example: `unsloth/Qwen2.5-0.5B-Instruct-bnb-4bit`. References: unslothai/unsloth-zoo#810, vllm-project/vllm#42488.
    """
    named = case.adapter.config.base_model or ""
    mark = _quantisation(named)
    if mark is None:
        return
    if case.base is None:
        return
    own = _text(case.base).get("quantization_config") or case.base.config.get("quantization_config")
    if not own:
        yield Found(
            f"the adapter was trained on `{named}` ({mark}), and this base is not quantised",
            field="base_model_name_or_path",
        )


@survey(
    "LP314",
    "trained-on-quantised-note",
    severity="info",
    hint="give the base that will be served with --model, to have it compared",
)
def quantised_note(case: Case) -> Iterator[Found]:
    """The config names a quantised base, and no base was given to compare it with.

    Why it matters: as LP313: served on weights in another precision, the adapter is another function.
    """
    named = case.adapter.config.base_model or ""
    mark = _quantisation(named)
    if case.base is None and mark is not None:
        yield Found(
            f"the adapter was trained on `{named}` ({mark}): on a base in another precision it is another function",
            field="base_model_name_or_path",
        )


def _quantisation(name: str) -> str | None:
    text = name.lower()
    found = next((mark for mark in QUANTISED if mark in text), None)
    return found.strip("-") if found else None


def _without_quantisation(word: str) -> str:
    for mark in (*QUANTISED, "unsloth", "hf"):
        word = word.replace(mark, "")
    return word.strip("-_.")


@survey(
    "LP315",
    "tokenizer-differs",
    severity="warning",
    needs="base",
    hint="serve with the adapter's template: `vllm serve --chat-template CKPT/chat_template.jinja`",
)
def tokenizer_differs(case: Case) -> Iterator[Found]:
    """The adapter's folder holds another chat template than the base's.

    What it does: compares the templates (chat_template.jinja, or the one in tokenizer_config.json) where both have one.

    Why it matters: vLLM takes tokenizer and template from the base alone and ignores the adapter's (it warns once, for
    every adapter): the adapter answers prompts of a form that it was not trained on.

    References: hiyouga/LlamaFactory#10596, unslothai/unsloth#1519.
    """
    assert case.base is not None
    mine, theirs = _template(case.adapter.path), _template(case.base.path)
    if mine is not None and theirs is not None and mine[0].strip() != theirs[0].strip():
        yield Found(f"`{mine[1].name}` beside the adapter is not the base's template", path=mine[1])


MAX_TEMPLATE = 1_000_000


def _template(folder: Path) -> tuple[str, Path] | None:
    path = folder / "chat_template.jinja"
    try:
        if path.is_file() and path.stat().st_size < MAX_TEMPLATE:
            return path.read_text(encoding="utf-8"), path
    except (OSError, UnicodeDecodeError):
        return None
    path = folder / "tokenizer_config.json"
    try:
        found = read_json(path).get("chat_template") if path.is_file() else None
    except ProbeError:
        return None
    if isinstance(found, str):
        return found, path
    return (json.dumps(found), path) if found else None


def _text(base: Base) -> Mapping[str, Any]:
    inner = base.config.get("text_config")
    return {**base.config, **inner} if isinstance(inner, dict) else base.config


@survey(
    "LP316",
    "shared-keys-and-values",
    severity="info",
    needs="base",
    hint="nothing to mend: the tensors have no effect in any engine",
)
def shared_keys(case: Case) -> Iterator[Found]:
    """The base's last layers reuse the keys and values of earlier ones, and the adapter has pairs for theirs.

    Why it matters: there is no such module there, so the pairs are dropped by both engines (LP303), and were never
    trained.

    References: vllm-project/vllm#54917.
    """
    assert case.base is not None
    text = _text(case.base)
    shared, layers = text.get("num_kv_shared_layers"), text.get("num_hidden_layers")
    if not isinstance(shared, int) or not isinstance(layers, int) or shared <= 0:
        return
    pairs = [
        pair
        for pair in case.adapter.modules
        if projection_of(pair.module) in ("k_proj", "v_proj") and (layer_of(pair.module) or 0) >= layers - shared
    ]
    if pairs:
        yield Found(
            f"the last {shared} of {layers} layers share keys and values; the file has {len(pairs)} pairs for theirs",
            keys=tuple(pair.key for pair in pairs),
        )


@survey(
    "LP317",
    "part-of-the-base",
    needs="weights of the base",
    hint="write `pissa` or `olora` back into init_lora_weights for PEFT, or convert the adapter",
)
def part_of_the_base(case: Case) -> Iterator[Found]:
    """A and B are a part of this very base's weights, and the config does not say so.

    What it does: reads the weights of up to three modules and looks whether A is what B says of the weight, as PiSSA
    and OLoRA begin. Pairs that began at zero have a cosine near 0, such pairs one near 1.

    Why it matters: someone set init_lora_weights to true to get past vLLM's refusal, which offers just that. The part
    was taken out of the base in training and is not taken out any more: it counts twice, in both engines, without a
    word. Measured: PiSSA 0.05 and OLoRA 0.09 away from the trained model, whose whole training signal was 0.02.

    References: huggingface/transformers#34468.
    """
    init = case.adapter.config.raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        return
    assert case.base is not None
    found = list(alignments(case.adapter, case.base))
    if found and min(cosine for _, cosine in found) > ALIGNED:
        pair, cosine = max(found, key=lambda item: item[1])
        said = f"`{pair.module}` is a part of the base's own weight (cosine {cosine:.2f})"
        yield Found(f"{said}, as PiSSA and OLoRA begin, and init_lora_weights is {init!r}", field="init_lora_weights")


ALIGNED = 0.5
"""PiSSA and OLoRA were at 0.97 and 0.99 after some training, at 0.82 and 0.93 where B had moved by its own size; pairs
that began at zero at 0.08 or less, those of the demo at 0.03."""
