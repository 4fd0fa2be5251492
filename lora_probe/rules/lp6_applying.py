"""LP6xx: what happened while tokens ran through the layer.

Out: `applied` and `agrees`; and what went wrong for requests, though every module of the adapter may be right.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_probe.precision import factor_text
from lora_probe.rules.registry import Family, rule

FAMILY = Family("LP6", "applying, in a running engine", commands="trace, compare", in_check=False)


@dataclass(frozen=True)
class Affected:
    """The rows that a rule on requests is about: `rows` rows of `requests` and of `more` other requests."""

    rows: int
    requests: tuple[str, ...]
    more: int = 0

    def counted(self, what: str = "row") -> str:
        """`48 rows of 3 requests`."""
        total = len(self.requests) + self.more
        return f"{self.rows} {what}{'s' * (self.rows != 1)} of {total} request{'s' * (total != 1)}"

    @property
    def named(self) -> str:
        """`cmpl-1, cmpl-2 and 1 more`."""
        return ", ".join(self.requests) + (f" and {self.more} more" if self.more else "")


@rule(
    "LP601",
    "never-applied",
    "applied",
    "absent",
    hint="look at the requests in the trace: they did not carry the adapter, or the layer never ran",
)
def never_applied(rows: int) -> str:
    """Requests asked for the adapter, but none of their rows was multiplied with it at this module.

    Why it matters: the adapter is loaded and has no effect.

    How it is seen: in the engine's own table from tokens to slots.
    """
    return f"none of the {rows} rows that requested the adapter was multiplied with it"


@rule(
    "LP602",
    "contamination",
    "applied",
    "wrong",
    hint="do not mix requests with and without adapters in this engine, or keep a spare slot (--max-loras)",
)
def contamination(adapter: str, affected: Affected) -> str:
    """Rows that did not request any adapter received the contribution of this one.

    Why it matters: requests for the base model are answered by the adapter. Its own rows may all be right; then it took
    effect, and the requests that are named here did not get what they asked for. vLLM up to 0.32 has this bug on its
    CPU backend: a row without an adapter in a mixed batch gets the adapter of the last slot, also one that was removed,
    because vLLM leaves its weights there. 0.33 does not have it.

    How it is seen: the norm that the kernel wrote for such a row is the norm that the row has with this adapter.

    Fix: upgrade, or leave the last slot empty (`--max-loras` = adapters + 1).
    """
    return f"{affected.counted()} that did not ask for `{adapter}` got its contribution: {affected.named}"


@rule(
    "LP603",
    "rows-missed",
    "applied",
    "wrong",
    hint="report it with this trace: some rows ran with another slot or without the layer",
)
def rows_missed(seen: int, expected: int) -> str:
    """Only some of the rows that requested the adapter were multiplied with it.

    Why it matters: part of the answer comes from the base model. An outdated table from tokens to slots looks like
    this (vllm-project/vllm#47724).
    """
    return f"{seen} of {expected} rows that requested the adapter were multiplied with it"


@rule(
    "LP604",
    "kernel-differs",
    "agrees",
    "wrong",
    hint="check the slot first: if it is right, the kernel computes something else than s·(x·Aᵀ)·Bᵀ of the file",
)
def kernel_differs(error: float, tolerance: float, rows: int, factor: float | None = None) -> str:
    """The kernel's output differs from s·(x·Aᵀ)·Bᵀ computed in float32 from the file, for the same x.

    What it does: if the output is a multiple of what it should be, the message states the factor: 2 if the engine
    applies a scaling of 2 twice, -1 for another sign.

    Why it matters: the input x is the same, so the cause is not in earlier layers. If `placed` is wrong too, the slot
    is the cause; if `placed` is ok, the kernel is.

    How it is seen: on the first 4 prefill and the first 2 decode rows of each request, in the engine's process. The
    tolerance follows from the dtype.
    """
    if factor is not None:
        times = f"{factor_text(factor)} times what it should be"
        return f"the contribution is {times} on {rows} sampled rows (tolerance {tolerance:.2g})"
    return f"the contribution differs by {error:.2g} relative on {rows} sampled rows (tolerance {tolerance:.2g})"


@rule(
    "LP605",
    "not-finite-output",
    "agrees",
    "wrong",
    hint="look at `stored` first, then at the layers before it: the layer returned NaN or infinity",
)
def not_finite_output() -> str:
    """The contribution of the layer, or its input, contains NaN or infinity.

    Why it matters: every later token is noise. If the file is finite, the cause is an earlier layer or the kernel
    (vllm-project/vllm#48590).
    """
    return "the contribution contains NaN or infinity on a sampled row"


@rule(
    "LP606",
    "not-in-its-slot",
    "applied",
    "wrong",
    hint="fix the adapter and load it under a new id, or restart the engine: it must not answer with this slot",
)
def not_in_its_slot(adapter: str, affected: Affected) -> str:
    """Rows that requested the adapter ran with a slot that was not filled with it.

    Why it matters: the answer is neither the adapter's nor the base model's. vLLM up to 0.32 registers an adapter
    before it fills the slot. If filling fails, `add_lora` raises; the next `add_lora` with the same id returns True,
    and requests are answered from a half-filled slot, or with what another adapter left there. 0.33 registers it
    afterwards. A stale table from tokens to slots has the same effect.

    How it is seen: no load of the adapter has a slot, or the engine's table names another slot than the load's.
    """
    return f"{affected.counted()} for `{adapter}` ran with a slot that does not hold it: {affected.named}"


@rule(
    "LP607",
    "other-weights-in-prefix-cache",
    "applied",
    "wrong",
    hint="load each version of an adapter under a name of its own, or call `reset_prefix_cache` after replacing one",
)
def other_weights_in_prefix_cache(adapter: str, affected: Affected) -> str:
    """Positions of the prompt were taken from the prefix cache, where other weights of the same name computed them.

    Why it matters: the keys and values of these positions are those of the former adapter, so the answer is neither the
    former nor the new one's, although every row that was computed is right. vLLM finds cached blocks by the tokens and
    by the adapter's name (0.32: and its path), not by its weights. An adapter that is replaced under its name, by
    `load_inplace` or by unloading and loading, reuses the blocks of its predecessor.

    How it is seen: the probe keeps which load computed each block, and compares the digest of its file with that of the
    load that the request asked for.
    """
    counted = affected.counted("cached position")
    return f"{counted} for `{adapter}` were computed with other weights of that name: {affected.named}"


@rule(
    "LP608",
    "served-as-base",
    "applied",
    "wrong",
    engines=("server",),
    hint="run `lora-probe check` on the adapter, and look at the names of its modules: the server applies none of them",
)
def served_as_base(adapter: str, base: str) -> str:
    """The server answers a request for the adapter exactly as it answers a request for its base model.

    Why it matters: the server accepts the adapter, answers with status 200, and serves the base model. vLLM does that
    if no name in the adapter matches one of its modules; another server may ignore the name in the request.

    How it is seen: the log-probabilities of the same tokens, with and without the adapter, differ no more than those of
    two passes over them.

    Fix: `lora-probe check` names the modules that the server cannot apply. An adapter whose B is zero (an untrained
    one) has no effect either.
    """
    return f"the server answers requests for `{adapter}` exactly as those for its base `{base}`"


@rule(
    "LP609",
    "served-at-another-scaling",
    "applied",
    "wrong",
    engines=("server",),
    hint="compare lora_alpha, r and use_rslora of the folder that the server loads with those of this one",
)
def served_at_another_scaling(adapter: str, factor: float) -> str:
    """The server runs these weights at another scaling than the one they were trained with.

    Why it matters: the effect of the adapter is multiplied. A factor of 2 is a doubled lora_alpha, √r is rsLoRA on one
    side only, and the scaling itself (or its inverse) is one that is applied twice (or not at all).

    How it is seen: PEFT runs the same tokens with the adapter at several scalings. At this one its log-probabilities
    are those of the server.
    """
    return f"the server runs `{adapter}` at {factor:.3g} times the scaling it was trained with"


@rule(
    "LP610",
    "served-other-weights",
    "applied",
    "wrong",
    engines=("server",),
    hint="compare the files of both folders: the server has loaded another adapter, an older one, or only part of it",
)
def served_other_weights(adapter: str, error: float, effect: float) -> str:
    """The server's answers are those of another adapter, or of only part of this one.

    Why it matters: the adapter has an effect, so it seems to work; but its answers are not what was trained.

    How it is seen: PEFT runs the same tokens with the adapter. No scaling gives the log-probabilities of the server,
    although both base models agree. The error is stated beside the adapter's whole effect in PEFT.
    """
    return (
        f"the server does not run `{adapter}` as this folder has it: log-probabilities differ by {error:.2g} "
        f"from PEFT's, where the adapter changes them by {effect:.2g}"
    )


@rule(
    "LP611",
    "served-on-another-base",
    "applied",
    "wrong",
    engines=("server",),
    hint="pass the model that the server runs with --model, or serve the one that the adapter was trained on",
)
def served_on_another_base(base: str, error: float) -> str:
    """The server's base model answers differently from the one that the adapter was trained on.

    Why it matters: an adapter changes a model relative to its own base. On another one its effect is arbitrary.

    How it is seen: PEFT runs the same tokens through the base model without the adapter, and the log-probabilities
    differ by more than another dtype or a quantised base explains.
    """
    return f"the server's base model is not `{base}`: without any adapter their log-probabilities differ by {error:.2g}"
