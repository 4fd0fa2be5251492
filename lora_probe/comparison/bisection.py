"""Which modules change the answer: the smallest set whose weights make an engine choose the candidate's token.

In: a `Comparison` whose answers differ. Out: a `Bisection`. The engine runs the tokens up to the first one that
differs, with some modules as they are in the reference and some as they are in the candidate: with the weights of its
file, at its scale, switched off where they were lost, or with what vLLM had in its slots, right or wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_probe.adapter import open_adapter
from lora_probe.comparison.compared import Bisection, Comparison
from lora_probe.engines.bisecting import bisect as run
from lora_probe.engines.child import Progress
from lora_probe.engines.mixtures import BisectSpec, Side
from lora_probe.errors import ProbeError
from lora_probe.names import Key, natural
from lora_probe.prediction.predictor import title_of
from lora_probe.recording import Load, RunSpec, Trace

PEFT = "peft"
"""The engine of a bisection unless the runs need another one. Its layers have no slots that could hold anything else
than the file."""


def bisect(
    comparison: Comparison,
    most: int,
    model: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    engine: str | None = None,
) -> Bisection:
    """Find the modules that change the first token that differs, in at most `most` runs. `model` is the base, by
    default that of the reference. `engine` runs the mixtures: by default that of both runs, and of two different
    engines PEFT, unless the other one held weights that are in no file.

    Raises:
        ProbeError: the answers are the same, the weights of a run are not in a file any more, or s·B·A is the same.
        EngineFailed: the engine cannot load the adapters.
    """
    first = comparison.outputs.first_token
    if any(trace.outcomes for trace in comparison.traces):
        raise ProbeError("the weights of a server are not known")
    if not comparison.requests:
        raise ProbeError("no answers were compared")
    if first is None or first.reference is None or first.candidate is None:
        raise ProbeError("both runs answer with the same tokens, so no module changes one")
    request = next(diff.reference for diff in comparison.requests if diff.prompt == first.prompt)
    ids = [*request.prompt_ids, *request.output_ids[: first.token]]
    spec = _spec(comparison, ids, most, model, engine)
    result = run(spec, progress)
    if result.reference != first.reference:
        weights = f"{title_of(spec.engine)} with the weights of {comparison.reference.path}"
        raise ProbeError(f"{weights} chooses token {result.reference}, not {first.reference}")
    return Bisection(
        first.prompt,
        first.token,
        first.reference,
        first.candidate,
        result.candidate,
        tuple(result.modules),
        len(spec.changed),
        result.runs,
        result.minimal,
        spec.engine,
    )


def _spec(comparison: Comparison, ids: list[int], most: int, model: str | None, engine: str | None) -> BisectSpec:
    """What runs, and in which engine.

    Raises:
        ProbeError: as `bisect`.
    """
    reference, candidate = comparison.traces
    runs = [_run_of(trace) for trace in comparison.traces]
    changes = _changes(comparison)
    if not changes.modules:
        raise ProbeError("s·B·A of both runs is the same, so no module changes a token")
    wrong = [not ledger.healthy for ledger in comparison.ledgers]
    engine = engine or _suitable(comparison, changes, wrong)
    as_loaded = [
        trace.engine == engine != PEFT and is_wrong for trace, is_wrong in zip(comparison.traces, wrong, strict=True)
    ]
    if changes.in_no_file and not any(as_loaded):
        raise ProbeError(f"a run held other weights than its file, so {title_of(engine)} cannot run with them")
    return BisectSpec(
        engine=engine,
        model=model or runs[0].model,
        dtype=next((worker.process.dtype for worker in reference.workers), "") or "auto",
        reference=Side(_load_of(reference).path, as_loaded=as_loaded[0]),
        candidate=Side(
            _load_of(candidate).path,
            off=sorted({module for module, _, _ in changes.off}),
            factors={key[0]: factor for key, factor in changes.factors.items()},
            as_loaded=as_loaded[1],
        ),
        ids=ids,
        changed=sorted({module for module, _, _ in changes.modules}, key=natural),
        runs=most,
        run=next((run for run in runs if run.engine == engine), runs[0]),
    )


def _run_of(trace: Trace) -> RunSpec:
    """Raises ProbeError: it is not known what it ran."""
    if trace.run is None:
        raise ProbeError(f"`{trace.path}` does not contain what it ran")
    return trace.run.spec


def _load_of(trace: Trace) -> Load:
    """The load of a trace, whose file is unchanged.

    Raises:
        ProbeError: there is none, or its folder is gone or holds other weights now.
    """
    if not trace.loads:
        raise ProbeError(f"`{trace.path}` does not contain what it ran")
    load, _ = trace.loads[-1]
    if open_adapter(load.path).digest() != load.digest:
        raise ProbeError(f"`{load.path}` has changed since `{trace.path}` was recorded")
    return load


@dataclass(frozen=True)
class _Changes:
    """The `modules` that differ; those that the candidate runs without an adapter (`off`), and the factors of others.
    `in_no_file`: some run with weights that no factor makes of those of their file."""

    modules: set[Key]
    off: set[Key]
    factors: dict[Key, float] = field(default_factory=dict)
    in_no_file: bool = False


def _changes(comparison: Comparison) -> _Changes:
    """Raises ProbeError: modules of the reference were lost."""
    lost = [{row.key for row in ledger.rows if row.fate == "lost"} for ledger in comparison.ledgers]
    if lost[0] - lost[1]:
        raise ProbeError("modules of the reference were lost: pass the run first in which all took effect")
    off = lost[1] - lost[0]
    factors: dict[Key, float] = {}
    for difference in comparison.weights:
        if difference.factor is not None:
            factors |= dict.fromkeys(difference.keys, difference.factor)
    keys = [difference.keys for difference in (*comparison.weights, *comparison.file_weights)]
    keys += [difference.keys for difference in comparison.adapters]
    modules = off.union(*keys, *comparison.unshared)
    return _Changes(modules, off, factors, any(difference.factor is None for difference in comparison.weights))


def _suitable(comparison: Comparison, changes: _Changes, wrong: list[bool]) -> str:
    """The engine of both runs, or one that held weights that are in no file; otherwise PEFT."""
    engines = [trace.engine for trace in comparison.traces]
    if engines[0] == engines[1]:
        return engines[0]
    held = [engine for engine, is_wrong in zip(engines, wrong, strict=True) if is_wrong and engine != PEFT]
    return held[0] if changes.in_no_file and held else PEFT
