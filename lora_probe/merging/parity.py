"""Whether a merged model does what the adapter does: `parity`, in the weights and in the outputs.

In: an adapter, its base model, and a merged model; without one, PEFT makes the merge. Out: `Parity`: the check of the
weights, the share of the adapter's effect that survives on the same tokens, and one verdict for both.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_probe.adapter import located, open_adapter
from lora_probe.base import find_model, open_checkpoint
from lora_probe.comparison.effect import Effect, effect
from lora_probe.engines import launch, require
from lora_probe.engines.folder import is_locked, lock
from lora_probe.errors import EngineFailed, ProbeError, words_of
from lora_probe.files import limits
from lora_probe.ledger import Finding
from lora_probe.merging.report import MergeReport, Verdict
from lora_probe.merging.weights import Progress, check_merge
from lora_probe.precision import STORED, floor
from lora_probe.presented import Presented
from lora_probe.rules import Diagnostic, all_rules
from lora_probe.rules.diagnostics import under
from lora_probe.rules.lp7_merging import effect_lost, effect_not_measured

SURVIVES = 0.9
"""The share of the adapter's effect on the outputs that must survive."""
REPORT = "parity.json"
"""The report that the command line writes into the folder of -o. A folder without it is never overwritten."""


@dataclass(frozen=True, repr=False)
class Parity(Presented):
    """Both halves. `outputs` is None if they were not requested or could not be measured (`findings` has the reason).
    `made` is the dtype in which PEFT made the merge, None if the merged model was passed; `warnings` are PEFT's."""

    weights: MergeReport
    outputs: Effect | None
    engine: str | None
    made: str | None
    warnings: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        values = {finding.value for finding in self.findings}
        if self.weights.verdict == "differs" or values & {"wrong", "absent"}:
            return "differs"
        return "undecided" if self.weights.verdict == "undecided" or "unknown" in values else "verified"

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """The findings about the weights, then those about the outputs."""
        engines = (self.engine,) if self.engine else ()
        about_outputs = []
        for finding in self.findings:
            explained = finding.code == "LP716" and self.weights.verdict == "differs"
            hint = "see the findings about the weights above" if explained else ""
            about_outputs.append(under(all_rules()[finding.code], finding.message, engines=engines, hint=hint))
        return (*self.weights.diagnostics, *about_outputs)


def later_in_outputs(weights: MergeReport, outputs: Effect) -> str:
    """Why the outputs first differ at a later module than the weights: a small change of an output is within round-off.
    Empty if they do not."""
    order = {module.key: number for number, module in enumerate(outputs.modules)}
    wrong = [module.key for module in weights.modules if module.status == "differs" and module.key in order]
    first = outputs.first_module
    earliest = min(wrong, key=lambda key: order[key], default=None)
    if first is None or earliest is None or order[earliest] >= order[first.key]:
        return ""
    error, limit = outputs.modules[order[earliest]].error, outputs.tolerance
    state = f"stays within the tolerance of {outputs.dtype}" if error <= limit else "exceeds it at later tokens only"
    return f"{outputs.name(earliest)}, the first module with wrong weights, {state}: error {error:.1e}"


def parity(
    adapter: str | Path,
    *,
    model: str | None = None,
    merged: str | Path | None = None,
    engine: str = "peft",
    weights_only: bool = False,
    prompts: str | Sequence[str] = (),
    chat: bool = False,
    max_tokens: int = 32,
    out: str | Path | None = None,
    force: bool = False,
    options: dict[str, Any] | None = None,
    engine_args: Sequence[str] = (),
    weights_progress: Callable[[Progress], None] | None = None,
    engine_progress: Callable[[str, launch.Progress], None] | None = None,
) -> Parity:
    """Check whether the merged model does what the adapter does.

    `model` is the base (default: the adapter's own). Without `merged`, PEFT merges the adapter into it, in
    `options["dtype"]` (default: as the base is stored). The outputs are measured in `engine`, in the dtype of the
    merged model, on the unmerged adapter's own answers of up to `max_tokens` tokens to `prompts` (default: three
    built-in ones; `chat`: through the chat template). `options` and `engine_args` are those of `trace`. With `out`, the
    merged model and both traces are kept there. `weights_progress` receives bytes, `engine_progress` named stages.

    Raises:
        ProbeError: bad input, or an existing `out` without `force`.
        EngineFailed: PEFT could not merge. An engine that cannot run is a finding, because the weights were judged.
    """
    texts, flags = words_of("prompts", prompts), launch.flags_of(engine_args)
    limits.begin(located(Path(adapter)))
    checkpoint = open_adapter(adapter)
    name = checkpoint.config.base_or(model)
    if not weights_only:
        _check_requested(engine, texts, max_tokens, flags)
    dtype = str((options or {}).get("dtype") or "auto")
    warnings: tuple[str, ...] = ()
    made_here = merged is None
    with _workplace(out, force, 0 if merged is not None else open_checkpoint(find_model(name)).size) as folder:
        if merged is None:
            merging = _named(engine_progress, "merge")
            try:
                merge = launch.merge(adapter, out=folder / "merged", model=model, dtype=dtype, progress=merging)
            except EngineFailed as error:
                error.hint = error.hint if out is not None else "add -o DIR to keep its log"
                raise
            merged, warnings = merge.path, merge.warnings
        weights = check_merge(adapter, merged, model=name, progress=weights_progress or (lambda _: None))
        made = weights.merged_dtype if made_here else None
        if weights_only:
            return Parity(weights, None, None, made, warnings, ())
        dtype = _dtype_of(weights) if dtype == "auto" else dtype
        run = _Run(adapter, model, Path(merged), engine, {**(options or {}), "dtype": dtype}, tuple(flags))
        try:
            outputs = _effect(run, folder, texts, chat, max_tokens, engine_progress)
        except EngineFailed as error:
            log = "" if out is not None else " (add -o DIR to keep its log)"
            why = effect_not_measured(f"{engine} could not run both models: {error.message}{log}")
            return Parity(weights, None, engine, made, warnings, (why,))
        return Parity(weights, outputs, engine, made, warnings, tuple(_judged(outputs)))


def _dtype_of(weights: MergeReport) -> str:
    """The dtype in which to run a merged model: the one that it is stored in, if engines run in it."""
    stored = STORED.get(weights.merged_dtype)
    return stored.name if stored is not None and stored.fits_float32 else "auto"


@dataclass(frozen=True)
class _Run:
    """What the engine runs: the adapter on its base, then the merged model, both with the same options."""

    adapter: str | Path
    model: str | None
    merged: Path
    engine: str
    options: dict[str, Any]
    engine_args: tuple[str, ...]


def _effect(
    run: _Run,
    folder: Path,
    prompts: Sequence[str],
    chat: bool,
    max_tokens: int,
    progress: Callable[[str, launch.Progress], None] | None,
) -> Effect:
    """Run both models and compare their outputs; the traces are written to `folder`.

    Raises:
        EngineFailed: the engine could not run one of the models, or refused the adapter.
    """
    unmerged = launch.trace(
        run.adapter,
        engine=run.engine,
        model=run.model,
        prompts=prompts,
        chat=chat,
        max_tokens=max_tokens,
        score=True,
        out=folder / "unmerged.lptrace",
        options=run.options,
        engine_args=run.engine_args,
        progress=_named(progress, f"{run.engine}, unmerged"),
    )
    refusals = [load.message for load, _ in unmerged.loads if load.refused]
    if refusals:
        raise EngineFailed(f"it refuses the adapter: {refusals[0]}")
    merged = launch.trace_plain(
        run.merged,
        engine=run.engine,
        follow=unmerged,
        out=folder / "merged.lptrace",
        options={key: value for key, value in run.options.items() if "lora" not in key},
        engine_args=run.engine_args,
        progress=_named(progress, f"{run.engine}, merged"),
    )
    return effect(unmerged, merged)


def _named(progress: Callable[[str, launch.Progress], None] | None, name: str) -> Callable[[launch.Progress], None]:
    return partial(progress, name) if progress is not None else lambda _: None


def _check_requested(engine: str, prompts: Sequence[str], max_tokens: int, engine_args: Sequence[str]) -> None:
    """Reject what is wrong in the request before gigabytes are read."""
    require(engine, engine_args)
    if max_tokens < 1:
        raise ProbeError(f"--max-tokens must be at least 1, not {max_tokens}")
    if not all(prompts):
        raise ProbeError("a prompt is empty", "pass a prompt with text in it")


def _judged(outputs: Effect) -> Iterator[Finding]:
    """Findings unless enough of the effect survives. A difference within round-off is not judged."""
    if outputs.survives is None or outputs.kl_merged is None:
        why = outputs.notes[0] if outputs.notes else "the adapter makes no difference on these prompts"
        yield effect_not_measured(why)
    elif not outputs.survives >= SURVIVES:
        if outputs.kl_merged <= floor(outputs.dtype):
            yield effect_not_measured(
                f"{100 * outputs.survives:.0f} % survives, and the rest is within the round-off of {outputs.dtype}"
            )
        else:
            yield effect_lost(outputs.survives, outputs.tokens, _where(outputs))
    elif not (outputs.unmerged.complete and outputs.merged.complete):
        yield effect_not_measured("a recording is incomplete")


def _where(outputs: Effect) -> str:
    first = outputs.first_module
    if first is None:
        return ""
    return (
        f"; the outputs first diverge at {outputs.name(first.key)} (prompt {first.prompt + 1}, error {first.error:.1e})"
    )


@contextmanager
def _workplace(out: str | Path | None, force: bool, size: int) -> Iterator[Path]:
    """The folder for the merged model and the traces: `out`, or a temporary one."""
    if out is None:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if size > free:
            raise ProbeError(
                f"a merged model of {size / 2**30:.1f} GiB does not fit into {tempfile.gettempdir()}",
                "pass a folder on another disk with -o",
            )
        with tempfile.TemporaryDirectory(prefix="lora-probe-") as temporary:
            yield Path(temporary)
        return
    folder = Path(out)
    if folder.exists():
        if not (folder / REPORT).exists():
            raise ProbeError(
                f"`{folder}` was not written by parity and is not overwritten", "pass another folder with -o"
            )
        if is_locked(folder / REPORT):
            raise ProbeError(
                f"`{folder}` is being written by another process", "wait until it ends, or pass another folder with -o"
            )
        if not force:
            raise ProbeError(f"`{folder}` already exists", "pass another folder with -o, or overwrite it with --force")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ProbeError(f"cannot create the folder `{folder}`: {error.strerror or error}") from error
    # Written first, so that the folder of an interrupted run can be overwritten as well.
    with (folder / REPORT).open("w") as report:
        report.write("{}\n")
        report.flush()
        lock(report)
        yield folder
