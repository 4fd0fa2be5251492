"""LP7xx: what a merged model holds instead of base plus adapter, in its weights and in its outputs."""

from __future__ import annotations

from lora_probe.files import shown
from lora_probe.rules.registry import Family, rule

FAMILY = Family("LP7", "merging", commands="parity", in_check=False)

UNRELATED = 0.2
"""Less of ΔW than this in a change, and it is called another adapter's."""


@rule(
    "LP701",
    "not-merged",
    "merge",
    "absent",
    hint="the exporter saved the base; merge again with PEFT's merge_and_unload() and save what it returns",
    short="not merged",
    per_message=True,
)
def not_merged(stored: str) -> str:
    """The merged model holds the base's weight, unchanged.

    Why it matters: the export looks like a merge and is the base. Exporters that read the weights from the base's
    files, or that match no name of the adapter, end like this without a word (unslothai/unsloth#869, #611;
    huggingface/peft#868).

    How it is seen: every value equals the base's, and ΔW would have changed some of them even in this dtype.
    """
    return f"the base's weight, unchanged, in {stored}"


@rule(
    "LP702",
    "merged-twice",
    "merge",
    "wrong",
    hint="merge into the pristine base once; with tied embeddings adapt one of the two places only",
    short="twice",
    per_message=True,
)
def merged_twice() -> str:
    """The change is in the weight two times.

    Why it matters: the adapter acts with double strength. It happens where a merged model is given as the base of a
    second merge, and in PEFT itself where the tied input and output embeddings are both adapted: both changes go
    into the one matrix.
    """
    return "merged twice"


@rule(
    "LP703",
    "wrong-scaling",
    "merge",
    "wrong",
    hint="the scaling is alpha / r (alpha / sqrt(r) with rsLoRA, rank_pattern and alpha_pattern first); merge again",
    per_message=True,
)
def wrong_scaling(implied: float, scaling: float, known_as: str) -> str:
    """The right change with another factor.

    Why it matters: the adapter acts too weakly or too strongly. Scripts forget alpha / r, mix it up with rsLoRA's
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
    hint="the change went in with the opposite sign: was the adapter unmerged from a base that never held it?",
    short="subtracted",
    per_message=True,
)
def subtracted() -> str:
    """The change was subtracted instead of added.

    Why it matters: the model moved away from what was trained. `unmerge()` on a base that never held the adapter does
    this.
    """
    return "subtracted instead of added"


@rule(
    "LP705",
    "another-module",
    "merge",
    "wrong",
    hint="the exporter mixed up names; merge again with PEFT's merge_and_unload()",
    short="another's",
)
def another_module(what: str, other: str) -> str:
    """The weight holds what belongs to another module.

    Why it matters: shapes fit, nothing complains, and the model computes something else. Layers counted from another
    number and q mixed up with k look like this.
    """
    return f"it holds the {what} of {shown(other)}"


@rule(
    "LP720",
    "transposed-change",
    "merge",
    "wrong",
    hint="a Conv1D (GPT-2) lies transposed in the file: add (B·A)ᵀ there (fan_in_fan_out)",
    short="transposed",
)
def transposed_change() -> str:
    """The right change, transposed.

    Why it matters: where a layer has as many inputs as outputs nothing complains. Hand-written merges of Conv1D models,
    or of factors from another library, forget the transpose.
    """
    return "the change is there transposed"


@rule(
    "LP706",
    "unexplained-change",
    "merge",
    "wrong",
    hint="was it another adapter, another checkpoint of it, or a second change on top? merge again and compare",
    short="unexplained",
)
def unexplained_change(share: float | None, residual: float | None, values: int, count: int) -> str:
    """The weight was changed, and not by this adapter alone: no factor of s·B·A and no other module's explains it.

    Why it matters: it is another adapter, another training step, or something was added afterwards.

    How it is seen: what is left after the best factor is far more than rounding. `share` is how much of this
    adapter's ΔW is in the change, `residual` what else there is, relative to ΔW.
    """
    found = f"{values} of {count} values are not what the merge gives"
    if share is None or residual is None:
        return found
    if abs(share) < UNRELATED:
        found = f"this looks like another adapter: {found}"
    return f"{found}; {100 * share:.1f} % of ΔW is there, and {residual:.2g} times as much of something else"


@rule(
    "LP707",
    "lost-to-rounding",
    "merge",
    "wrong",
    hint="merge in float32 and serve that, or serve the adapter unmerged: this dtype cannot hold so small a change",
)
def lost_to_rounding(kept: float, stored: str) -> str:
    """The merge was executed rightly, and rounding swallowed much of the change.

    Why it matters: W + ΔW is rounded to the grid that W lies on; what is below half a step of it is gone. bfloat16 has
    8 bits: a ΔW of 5e-4 of W keeps about a third of its effect (unslothai/unsloth#3091). It is no bug of the exporter,
    and no other scaling.

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
    """The merged weight holds NaN or infinity.

    Why it matters: every token is noise. float16 overflows above 65504.
    """
    whose = "as the adapter's own pair does" if by_adapter else "the adapter's pair is finite"
    return f"{values} values are NaN or infinite; {whose}"


@rule(
    "LP715",
    "merge-not-judged",
    "merge",
    "unknown",
    severity="warning",
    hint="the weights do not decide here; the outputs of both models may (leave --weights-only out)",
    per_message=True,
)
def not_judged(why: str) -> str:
    """A part of the adapter whose merge cannot be checked: PEFT cannot merge it, or how it does is not known here.

    Why it matters: it is not passed. The verdict is `undecided` at best.
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
    """On the same tokens the merged model answers less like the unmerged adapter than it should.

    Why it matters: this is what the user of the merged model gets, whatever its weights look like.

    How it is seen: the share of the effect that survives is 1 − sqrt(KL(unmerged‖merged) / KL(unmerged‖base)), over the
    whole vocabulary and all answer tokens; under 90 % is an error.
    """
    return f"{100 * survives:.1f} % of the adapter's effect survives on {tokens} answer tokens{first}"


@rule(
    "LP717",
    "effect-not-measured",
    "merge",
    "unknown",
    severity="warning",
    hint="mend what the message names, or give prompts with --prompt on which the adapter makes a difference",
)
def effect_not_measured(why: str) -> str:
    """What survives of the effect could not be measured.

    Why it matters: a merge is only worth something if the answers stay; nothing was seen to be wrong, as nobody could
    look.
    """
    return why


@rule(
    "LP718",
    "base-of-the-initialisation",
    "merge",
    "ok",
    severity="warning",
    hint="save the adapter with path_initial_model_for_weight_conversion to get plain LoRA for the stored base",
    per_message=True,
)
def rebased_base(init: str) -> str:
    """The adapter belongs to another base than the stored one: its initialisation took a part out of it.

    Why it matters: PiSSA and OLoRA train on W minus their first part. PEFT takes the part out again on every load; an
    engine that does not (vLLM) adds the adapter to the whole W. The merge was checked against the right base, computed
    here as PEFT computes it, which fixes the last bits only on the same machine.
    """
    without = "checked against the base without the part that the initialisation took out"
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
    """The adapter was added to the whole base, and belongs to the base without what its initialisation took out.

    Why it matters: PiSSA and OLoRA begin with a part of W in A and B, and take it out of W. PEFT does so again on
    every load; a tool that adds s·B·A to the stored W counts that part twice.
    """
    return f"merged into the whole base, without taking out what init_lora_weights={shown(init)} put into A and B"


@rule(
    "LP722",
    "magnitude-ignored",
    "merge",
    "wrong",
    hint="the exporter knows plain LoRA only; merge with PEFT, which rescales every row to its magnitude",
    short="no magnitude",
)
def magnitude_ignored() -> str:
    """A DoRA adapter was merged as plain LoRA: s·B·A was added, and the magnitudes were ignored.

    Why it matters: DoRA's rows are rescaled to trained lengths; without that the model is another one.
    """
    return "merged as plain LoRA, DoRA's magnitudes were ignored"


@rule(
    "LP719",
    "replacement-missing",
    "merge",
    "wrong",
    hint="the adapter carries these values whole (modules_to_save, trained tokens, bias); the exporter left them out",
    short="not replaced",
)
def replacement_differs(values: int, count: int, pristine: bool) -> str:
    """Values that the adapter carries whole are not in the merged model.

    Why it matters: trained heads, embeddings and tokens are lost. vLLM and many exporters know lora_A and lora_B only.
    """
    held = "the base's are there instead" if pristine else "something else is there"
    return f"{values} of {count} values are not the adapter's own; {held}"
