"""LP7xx: how a merged model differs from base model plus adapter, in its weights and in its outputs."""

from __future__ import annotations

from lora_probe.files import shown
from lora_probe.rules.registry import Family, rule

FAMILY = Family("LP7", "merging", commands="parity", in_check=False)

UNRELATED = 0.2
"""A change with less of ΔW than this is reported as another adapter's."""


@rule(
    "LP701",
    "not-merged",
    "merge",
    "absent",
    hint="merge again with PEFT's merge_and_unload() and save what it returns: the exporter saved the base model",
    short="not merged",
    per_message=True,
)
def not_merged(stored: str) -> str:
    """The merged model contains the base model's weight, unchanged.

    Why it matters: the export looks like a merge, but it is the base model. Exporters that read the weights from the
    base model's files, or whose names do not match the adapter's, silently produce this (unslothai/unsloth#869, #611;
    huggingface/peft#868).

    How it is seen: every value equals the base model's, although ΔW would have changed some of them even in this
    dtype.
    """
    return f"the base model's weight, unchanged, in {stored}"


@rule(
    "LP702",
    "merged-twice",
    "merge",
    "wrong",
    hint="merge into the original base model once; with tied embeddings adapt only one of the two",
    short="twice",
    per_message=True,
)
def merged_twice() -> str:
    """The change was added to the weight twice.

    Why it matters: the adapter acts with double strength. This happens if a merged model is the base model of a second
    merge, and in PEFT itself if the tied input and output embeddings are both adapted: both changes are added to the
    same matrix.
    """
    return "merged twice"


@rule(
    "LP703",
    "wrong-scaling",
    "merge",
    "wrong",
    hint="merge again with alpha / r (alpha / sqrt(r) with rsLoRA, rank_pattern and alpha_pattern first)",
    per_message=True,
)
def wrong_scaling(implied: float, scaling: float, known_as: str) -> str:
    """The change is right except for its scaling.

    Why it matters: the adapter acts too weakly or too strongly. Scripts forget alpha / r, confuse it with rsLoRA's
    alpha / sqrt(r), or ignore the patterns.

    How it is seen: with this factor PEFT's own arithmetic, rounding included, explains the merged values; with the
    config's factor it does not. Rounding alone never looks like this.
    """
    return f"merged with the scaling {implied:.6g} instead of {scaling:.6g}" + (f" ({known_as})" if known_as else "")


@rule(
    "LP704",
    "subtracted",
    "merge",
    "wrong",
    hint="merge again; check whether the adapter was unmerged from a base model that never contained it",
    short="subtracted",
    per_message=True,
)
def subtracted() -> str:
    """The change was subtracted instead of added.

    Why it matters: the model moved away from what was trained. `unmerge()` on a base model that never contained the
    adapter causes this.
    """
    return "subtracted instead of added"


@rule(
    "LP705",
    "another-module",
    "merge",
    "wrong",
    hint="merge again with PEFT's merge_and_unload(): the exporter mixed up names",
    short="another's",
)
def another_module(what: str, other: str) -> str:
    """The weight contains what belongs to another module.

    Why it matters: shapes fit, no tool reports an error, and the model computes something else. Typical causes are
    layers counted from a different number, and q swapped with k.
    """
    return f"it contains the {what} of {shown(other)}"


@rule(
    "LP720",
    "transposed-change",
    "merge",
    "wrong",
    hint="add (B·A)ᵀ: a Conv1D (GPT-2) is stored transposed (fan_in_fan_out)",
    short="transposed",
)
def transposed_change() -> str:
    """The change is right, but transposed.

    Why it matters: if a layer has as many inputs as outputs, no tool reports an error. Hand-written merges of Conv1D
    models, or of factors from another library, forget the transpose.
    """
    return "the change is there, but transposed"


@rule(
    "LP706",
    "unexplained-change",
    "merge",
    "wrong",
    hint="check for another adapter, another checkpoint or a second change on top; then merge again and compare",
    short="unexplained",
)
def unexplained_change(share: float | None, residual: float | None, values: int, count: int) -> str:
    """The weight was changed, but not by this adapter alone: no factor of s·B·A and no other module's change explains
    it.

    Why it matters: it is another adapter, another training step, or something was added afterwards.

    How it is seen: the remainder after the best factor is far larger than rounding. `share` is how much of this
    adapter's ΔW is in the change, `residual` is everything else, relative to ΔW.
    """
    message = f"{values} of {count} values differ from the correct merge"
    if share is None or residual is None:
        return message
    if abs(share) < UNRELATED:
        message = f"this looks like another adapter: {message}"
    return f"{message}; {100 * share:.1f} % of ΔW is there, plus {residual:.2g} times as much of something else"


@rule(
    "LP707",
    "lost-to-rounding",
    "merge",
    "wrong",
    hint="merge in float32 and serve that, or serve the adapter unmerged: this dtype cannot hold so small a change",
)
def lost_to_rounding(kept: float, stored: str) -> str:
    """The merge is correct, but rounding removed much of the change.

    Why it matters: W + ΔW is rounded to the precision of W; anything below half a step is lost. bfloat16 has 8 bits: a
    ΔW of 5e-4 of W keeps about a third of its effect (unslothai/unsloth#3091). It is not a bug of the exporter, and
    another scaling does not help.

    How it is seen: `effect_kept` = ⟨replay − W, ΔW⟩ / ⟨ΔW, ΔW⟩ of PEFT's own arithmetic, under 50 % for a module or
    under 90 % for the adapter.
    """
    return f"rounding to {stored} keeps {100 * kept:.0f} % of the change"


@rule(
    "LP711",
    "not-finite-merge",
    "merge",
    "wrong",
    hint="look at the adapter first (`lora-probe inspect --norms`); safe_merge=True in PEFT refuses such a merge",
    short="not finite",
)
def not_finite_merge(values: int, by_adapter: bool) -> str:
    """The merged weight contains NaN or infinity.

    Why it matters: every token is noise. float16 overflows above 65504.
    """
    whose = "the adapter's pair is not finite either" if by_adapter else "the adapter's pair is finite"
    return f"{values} values are NaN or infinite; {whose}"


@rule(
    "LP715",
    "merge-not-judged",
    "merge",
    "unknown",
    severity="warning",
    hint="compare the outputs of both models (without --weights-only): the weights alone do not decide here",
    per_message=True,
)
def not_judged(why: str) -> str:
    """The merge of a part of the adapter cannot be checked: PEFT cannot merge it, or lora-probe does not know how PEFT
    does.

    Why it matters: this part has not passed. The verdict is `undecided` at best.
    """
    return why


@rule(
    "LP716",
    "effect-lost",
    "merge",
    "wrong",
    hint="look at the weights first; if they are right, the dtype of the merge is too coarse for this adapter",
)
def effect_lost(survives: float, tokens: int, first: str) -> str:
    """On the same tokens, the merged model is less like the unmerged adapter than it should be.

    Why it matters: these are the answers that users of the merged model get, whatever its weights look like.

    How it is seen: the share of the effect that survives is 1 − sqrt(KL(unmerged‖merged) / KL(unmerged‖base)), over
    the whole vocabulary and all answer tokens; under 90 % is an error.
    """
    return f"{100 * survives:.1f} % of the adapter's effect survives on {tokens} answer tokens{first}"


@rule(
    "LP717",
    "effect-not-measured",
    "merge",
    "unknown",
    severity="warning",
    hint="fix the cause in the message, or pass prompts with --prompt on which the adapter makes a difference",
)
def effect_not_measured(why: str) -> str:
    """The share of the effect that survives could not be measured.

    Why it matters: a merge is only useful if the answers stay the same. No error was found, but the outputs were not
    compared.
    """
    return why


@rule(
    "LP718",
    "base-of-the-initialisation",
    "merge",
    "ok",
    severity="warning",
    hint="save the adapter with path_initial_model_for_weight_conversion to get plain LoRA for the stored base model",
    per_message=True,
)
def rebased_base(init: str) -> str:
    """The adapter's initialisation subtracted a part from the base model, so the adapter does not fit the stored base
    model.

    Why it matters: PiSSA and OLoRA train on W minus their initial part. PEFT subtracts the part again on every load;
    an engine that does not (vLLM) adds the adapter to the whole W. The merge was checked against the right base model,
    computed here as PEFT computes it; its last bits are reproducible only on the same machine.
    """
    without = "checked against the base model without the part that the initialisation subtracts"
    return f"init_lora_weights is {shown(init)}: {without}"


@rule(
    "LP721",
    "part-not-taken-out",
    "merge",
    "wrong",
    hint="merge with PEFT, or convert the adapter first (path_initial_model_for_weight_conversion)",
    short="on the whole base",
)
def part_not_taken_out(init: str) -> str:
    """The adapter was added to the whole base model, but needs the base model without the part that its initialisation
    subtracted.

    Why it matters: PiSSA and OLoRA start with a part of W in A and B, and subtract it from W. PEFT does so again on
    every load; a tool that adds s·B·A to the stored W counts that part twice.
    """
    return (
        f"merged into the whole base model, without subtracting what init_lora_weights={shown(init)} put into A and B"
    )


@rule(
    "LP722",
    "magnitude-ignored",
    "merge",
    "wrong",
    hint="merge with PEFT, which rescales every row to its magnitude: the exporter supports only plain LoRA",
    short="no magnitude",
)
def magnitude_ignored() -> str:
    """A DoRA adapter was merged as plain LoRA: s·B·A was added, and the magnitudes were ignored.

    Why it matters: DoRA rescales rows to trained lengths; without that the model computes something else.
    """
    return "merged as plain LoRA: DoRA's magnitudes were ignored"


@rule(
    "LP719",
    "replacement-missing",
    "merge",
    "wrong",
    hint="copy the values that the adapter holds whole (modules_to_save, trained tokens, bias) into the merged model",
    short="not replaced",
)
def replacement_differs(values: int, count: int, pristine: bool) -> str:
    """Values that the adapter holds whole are not in the merged model.

    Why it matters: trained heads, embeddings and tokens are lost. vLLM and many exporters support only lora_A and
    lora_B.
    """
    held = "the base model's are there instead" if pristine else "something else is there"
    return f"{values} of {count} values are not the adapter's own; {held}"
