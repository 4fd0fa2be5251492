"""Which modules change the answer: the smallest set whose weights make PEFT choose the candidate's token.

In: a `Comparison` whose answers differ. Out: a `Bisection`. PEFT runs the tokens up to the first one that differs, with
some modules as they are in the reference and some as they are in the candidate: with the weights of its file, at its
scale, or switched off where they were lost.
"""

from __future__ import annotations

from collections.abc import Callable

from lora_probe.adapter import open_adapter
from lora_probe.comparison.compared import Bisection, Comparison
from lora_probe.engines.bisecting import bisect as run
from lora_probe.engines.child import Progress
from lora_probe.engines.peft.bisect import BisectSpec
from lora_probe.errors import ProbeError
from lora_probe.names import Key, natural
from lora_probe.recording import Load, Trace


def bisect(
    comparison: Comparison,
    most: int,
    model: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Bisection:
    """Find the modules that change the first token that differs, in at most `most` runs. `model` is the base, by
    default that of the reference.

    Raises:
        ProbeError: the answers are the same, the weights of a run are not in a file any more, or s·B·A is the same.
        EngineFailed: PEFT cannot load the adapters.
    """
    first = comparison.outputs.first_token
    if any(trace.outcomes for trace in comparison.traces):
        raise ProbeError("the weights of a server are not known")
    if not comparison.requests:
        raise ProbeError("no answers were compared")
    if first is None or first.reference is None or first.candidate is None:
        raise ProbeError("both runs answer with the same tokens, so no module changes one")
    request = next(diff.reference for diff in comparison.requests if diff.prompt == first.prompt)
    reference, candidate = comparison.traces
    loads = _load_of(reference), _load_of(candidate)
    changed, off, factors = _changes(comparison)
    if not changed:
        raise ProbeError("s·B·A of both runs is the same, so no module changes a token")
    assert reference.run is not None
    spec = BisectSpec(
        model=model or reference.run.spec.model,
        dtype=next((worker.process.dtype for worker in reference.workers), "") or "auto",
        reference=loads[0].path,
        candidate=loads[1].path,
        ids=[*request.prompt_ids, *request.output_ids[: first.token]],
        changed=sorted({module for module, _, _ in changed}, key=natural),
        off=sorted({module for module, _, _ in off}),
        factors={key[0]: factor for key, factor in factors.items()},
        runs=most,
    )
    found = run(spec, progress)
    if found.reference != first.reference:
        raise ProbeError(
            f"PEFT with the weights of {reference.path} chooses token {found.reference}, not {first.reference}"
        )
    return Bisection(
        first.prompt,
        first.token,
        first.reference,
        first.candidate,
        found.candidate,
        tuple(found.modules),
        len(spec.changed),
        found.runs,
        found.minimal,
    )


def _load_of(trace: Trace) -> Load:
    """The load of a trace, whose file is unchanged.

    Raises:
        ProbeError: there is none, or its folder is gone or holds other weights now.
    """
    if trace.run is None or not trace.loads:
        raise ProbeError(f"`{trace.path}` does not contain what it ran")
    load, _ = trace.loads[-1]
    if open_adapter(load.path).digest() != load.digest:
        raise ProbeError(f"`{load.path}` has changed since `{trace.path}` was recorded")
    return load


def _changes(comparison: Comparison) -> tuple[set[Key], set[Key], dict[Key, float]]:
    """The modules that differ; those that the candidate runs without an adapter; and the factors of others.

    Raises:
        ProbeError: the candidate, or the reference, runs with weights that are in no file.
    """
    lost = [{row.key for row in ledger.rows if row.fate == "lost"} for ledger in comparison.ledgers]
    if lost[0] - lost[1]:
        raise ProbeError("modules of the reference were lost: pass the run first in which all took effect")
    off = lost[1] - lost[0]
    factors: dict[Key, float] = {}
    for difference in comparison.weights:
        if difference.factor is None:
            raise ProbeError("the engine holds other weights than its file, so PEFT cannot run with them")
        factors |= dict.fromkeys(difference.keys, difference.factor)
    changed = {*off, *factors}
    changed.update(*(difference.keys for difference in comparison.file_weights))
    changed.update(*(difference.keys for difference in comparison.adapters), *comparison.unshared)
    return changed, off, factors
