"""LP6xx: what happened while tokens ran through the layer. Out: `applied` and `agrees`."""

from __future__ import annotations

from lora_probe.rules.registry import Family, rule

FAMILY = Family("LP6", "applying, in a running engine", commands="trace", in_check=False)


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
def contamination(rows: int) -> str:
    """Rows that did not request the adapter received its contribution.

    Why it matters: requests for the base model, or for another adapter, are answered by this one. vLLM up to 0.32 has
    this bug on its CPU backend: a row without an adapter in a mixed batch gets the adapter of the last slot. 0.33 does
    not have it.

    Fix: upgrade, or leave the last slot empty (`--max-loras` = adapters + 1).
    """
    return f"{rows} rows that did not request the adapter received its contribution"


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
def kernel_differs(error: float, tolerance: float, rows: int) -> str:
    """The kernel's output differs from s·(x·Aᵀ)·Bᵀ computed in float32 from the file, for the same x.

    Why it matters: the input x is the same, so the cause is not in earlier layers. If `placed` is wrong too, the slot
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
    hint="look at `stored` first, then at the layers before it: the layer returned NaN or infinity",
)
def not_finite_output() -> str:
    """The contribution of the layer, or its input, contains NaN or infinity.

    Why it matters: every later token is noise. If the file is finite, the cause is an earlier layer or the kernel
    (vllm-project/vllm#48590).
    """
    return "the contribution contains NaN or infinity on a sampled row"
