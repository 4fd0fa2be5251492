"""LP6xx: what happened while tokens ran through the layer. Out: `applied` and `agrees`."""

from __future__ import annotations

from lora_probe.rules.registry import Family, rule

FAMILY = Family("LP6", "applying, in a running engine", commands="trace", in_check=False)


@rule(
    "LP601",
    "never-applied",
    "applied",
    "absent",
    hint="the request did not carry the adapter, or the layer never ran: look at the requests in the trace",
)
def never_applied(rows: int) -> str:
    """Requests asked for the adapter, and no row of theirs was multiplied with it at this module.

    Why it matters: the adapter is loaded and has no effect. The engine's own table from tokens to slots says so.
    """
    return f"none of the {rows} rows that asked for the adapter was multiplied with it"


@rule(
    "LP602",
    "contamination",
    "applied",
    "wrong",
    hint="do not mix requests with and without adapters in this engine, or keep a spare slot (--max-loras)",
)
def contamination(rows: int) -> str:
    """Rows that did not ask for the adapter got its contribution.

    Why it matters: requests for the base, or for another adapter, are answered by this one. vLLM up to 0.32 does
    this on its CPU backend: a row without an adapter in a mixed batch gets the adapter of the last slot. 0.33 does not.

    Mend: upgrade, or leave the last slot empty (`--max-loras` = adapters + 1).
    """
    return f"{rows} rows that did not ask for the adapter got its contribution"


@rule(
    "LP603",
    "rows-missed",
    "applied",
    "wrong",
    hint="some rows ran with another slot or without the layer: report it with this trace",
)
def rows_missed(seen: int, expected: int) -> str:
    """Only some of the rows that asked for the adapter were multiplied with it.

    Why it matters: the answer is partly the base's. A stale table from tokens to slots looks like this
    (vllm-project/vllm#47724).
    """
    return f"{seen} of {expected} rows that asked for the adapter were multiplied with it"


@rule(
    "LP604",
    "kernel-differs",
    "agrees",
    "wrong",
    hint="what the kernel wrote is not s·(x·Aᵀ)·Bᵀ of the file; if the slot is right, the kernel is wrong",
)
def kernel_differs(error: float, tolerance: float, rows: int) -> str:
    """What the kernel wrote differs from s·(x·Aᵀ)·Bᵀ computed in float32 from the file, for the same x.

    Why it matters: drift from earlier layers cannot explain it, as x is the same. If `placed` is wrong too, the slot
    is the cause; if `placed` is ok, the kernel is.

    How it is seen: on the first 4 prefill and the first 2 decode rows of each request, in the engine's process. The
    tolerance follows from the dtype.
    """
    return f"the contribution differs by {error:.2g} relative on {rows} sampled rows (tolerance {tolerance:.2g})"


@rule(
    "LP605",
    "not-finite-output",
    "agrees",
    "wrong",
    hint="the layer gave NaN or infinity: look at `stored` first, then at the layers before it",
)
def not_finite_output() -> str:
    """The contribution of the layer, or its input, holds NaN or infinity.

    Why it matters: every token after it is noise. With a finite file the cause is an earlier layer or the kernel
    (vllm-project/vllm#48590).
    """
    return "the contribution holds NaN or infinity on a sampled row"
