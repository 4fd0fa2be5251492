"""What a merge preserves of an adapter: `parity`, in the weights and in the outputs.

In: an adapter and its base, and a merged model or none, in which case PEFT makes it. Out: `Parity`: the check of the
weights, what survives of the effect on the same tokens, one verdict over both.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_probe.adapter import open_adapter
from lora_probe.base import find_model, open_checkpoint
from lora_probe.comparison.effect import Effect, effect
from lora_probe.engines import launch, require
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.files import limits
from lora_probe.ledger import Finding
from lora_probe.merging.report import MergeReport, Verdict
from lora_probe.merging.weights import Progress, check_merge
from lora_probe.names import name_modules
from lora_probe.precision import STORED, floor
from lora_probe.rules import Diagnostic, all_rules
from lora_probe.rules.lp7_merging import effect_lost, effect_not_measured

SURVIVES = 0.9
"""The share of the adapter's effect on the outputs that must survive."""
REPORT = "parity.json"
"""What the command line writes into a kept folder; a folder without it is never overwritten."""


@dataclass(frozen=True)
class Parity:
    """Both halves. `outputs` is None where they were not asked for or could not be measured (`findings` say why);
    `made` says that PEFT made the merge here, in which dtype, and `said` what it warned of."""

    weights: MergeReport
    outputs: Effect | None
    engine: str | None
    made: str | None
    said: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        values = {finding.value for finding in self.findings}
        if self.weights.verdict == "differs" or values & {"wrong", "absent"}:
            return "differs"
        return "undecided" if self.weights.verdict == "undecided" or "unknown" in values else "verified"

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """Those of the weights, then those of the outputs."""
        engines = (self.engine,) if self.engine else ()
        found = []
        for finding in self.findings:
            rule = all_rules()[finding.code]
            if finding.code == "LP716" and self.weights.verdict == "differs":
                rule = replace(rule, hint="the weights above say why")
            found.append(Diagnostic(rule.code, rule.name, rule.severity, finding.message, rule.hint, engines=engines))
        return (*self.weights.diagnostics, *found)


def parity(
    adapter: str | Path,
    *,
    model: str | None = None,
    merged: str | Path | None = None,
    engine: str = "peft",
    weights_only: bool = False,
    prompts: Sequence[str] = (),
    chat: bool = False,
    max_tokens: int = 32,
    out: str | Path | None = None,
    force: bool = False,
    options: dict[str, Any] | None = None,
    engine_args: Sequence[str] = (),
    weights_progress: Callable[[Progress], None] | None = None,
    engine_progress: Callable[[str, launch.Progress], None] | None = None,
) -> Parity:
    """Does the merged model do what the adapter does?

    `model` is the base (default: the adapter's own). Without `merged` PEFT merges the adapter into it, in
    `options["dtype"]` (default: as the base is stored). The outputs are measured in `engine` in the dtype of the merged
    model, on the unmerged adapter's own answers of up to `max_tokens` tokens to `prompts` (default: three built-in
    ones; `chat`: through the chat template). `options` and `engine_args` are those of `trace`. With `out` the merged
    model and both traces are kept there. `weights_progress` is told of bytes, `engine_progress` of stages by name.

    Raises:
        ProbeError: bad input, or an existing `out` without `force`.
        EngineFailed: PEFT could not merge. An engine that cannot run is a finding: the weights have been judged.
    """
    limits.begin(Path(adapter))
    checkpoint = open_adapter(adapter)
    name = checkpoint.config.base_or(model)
    if not weights_only:
        _check_asked(engine, prompts, max_tokens, engine_args)
    wanted = dict(options or {})
    dtype = str(wanted.get("dtype") or "auto")
    said: tuple[str, ...] = ()
    made_here = merged is None
    with _workplace(out, force, 0 if merged is not None else open_checkpoint(find_model(name)).size) as folder:
        if merged is None:
            merging = _named(engine_progress, "merge")
            try:
                done = launch.merge(adapter, out=folder / "merged", model=model, dtype=dtype, progress=merging)
            except EngineFailed as error:
                error.hint = error.hint if out is not None else "add -o DIR to keep its log"
                raise
            merged, said = done.path, done.said
        weights = check_merge(adapter, merged, model=name, progress=weights_progress or (lambda _: None))
        made = weights.merged_dtype if made_here else None
        if weights_only:
            return Parity(weights, None, None, made, said, ())
        if dtype == "auto":
            stored = STORED.get(weights.merged_dtype)
            wanted["dtype"] = stored.name if stored is not None and stored.fits_float32 else "auto"
        try:
            unmerged = launch.trace(
                adapter,
                engine=engine,
                model=model,
                prompts=prompts,
                chat=chat,
                max_tokens=max_tokens,
                score=True,
                out=folder / "unmerged.lptrace",
                options=wanted,
                engine_args=engine_args,
                progress=_named(engine_progress, f"{engine}, unmerged"),
            )
            refused = [load.message for load, _ in unmerged.loads if load.refused]
            if refused:
                raise EngineFailed(f"it refuses the adapter: {refused[0]}")
            plain = launch.trace_plain(
                merged,
                engine=engine,
                follow=unmerged,
                out=folder / "merged.lptrace",
                options={key: value for key, value in wanted.items() if "lora" not in key},
                engine_args=engine_args,
                progress=_named(engine_progress, f"{engine}, merged"),
            )
            found = effect(unmerged, plain)
        except EngineFailed as error:
            log = "" if out is not None else " (add -o DIR to keep its log)"
            why = effect_not_measured(f"{engine} could not run both models: {error.message}{log}")
            return Parity(weights, None, engine, made, said, (why,))
        return Parity(weights, found, engine, made, said, tuple(_judged(found)))


def _named(progress: Callable[[str, launch.Progress], None] | None, name: str) -> Callable[[launch.Progress], None]:
    return partial(progress, name) if progress is not None else lambda _: None


def _check_asked(engine: str, prompts: Sequence[str], max_tokens: int, engine_args: Sequence[str]) -> None:
    """What can be known to be wrong before gigabytes are read."""
    require(engine, engine_args)
    if max_tokens < 1:
        raise ProbeError(f"--max-tokens is {max_tokens}; an answer has at least one token")
    if not all(prompts):
        raise ProbeError("a prompt is empty", "give a prompt that says something")


def _judged(found: Effect) -> Iterator[Finding]:
    """Whether enough of the effect survives. A difference that round-off alone can make says nothing."""
    if found.survives is None or found.kl_merged is None:
        why = found.notes[0] if found.notes else "the adapter makes no difference on these prompts"
        yield effect_not_measured(why)
    elif not found.survives >= SURVIVES:
        if found.kl_merged <= floor(found.dtype):
            yield effect_not_measured(
                f"{100 * found.survives:.0f} % survives, and the rest is no more than the round-off of {found.dtype}"
            )
        else:
            yield effect_lost(found.survives, found.tokens, _where(found))
    elif not (found.unmerged.complete and found.merged.complete):
        yield effect_not_measured("a recording is not complete")


def _where(found: Effect) -> str:
    first = found.first_module
    if first is None:
        return ""
    return (
        f"; the two part first at {name_modules([first.key[0]])} (prompt {first.prompt + 1}, error {first.error:.1e})"
    )


@contextmanager
def _workplace(out: str | Path | None, force: bool, size: int) -> Iterator[Path]:
    """The folder for the merged model and the traces: `out`, or one that is gone afterwards."""
    if out is None:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if size > free:
            raise ProbeError(
                f"a merged model of {size / 2**30:.1f} GiB does not fit into {tempfile.gettempdir()}",
                "name a folder on another disk with -o",
            )
        with tempfile.TemporaryDirectory(prefix="lora-probe-") as passing:
            yield Path(passing)
        return
    folder = Path(out)
    if folder.exists():
        if not (folder / REPORT).exists():
            raise ProbeError(f"`{folder}` was not written by parity; it stays as it is", "give another name with -o")
        if not force:
            raise ProbeError(f"`{folder}` exists", "give another name with -o, or overwrite it with --force")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ProbeError(f"cannot make the folder `{folder}`: {error.strerror or error}") from error
    # The mark comes first: a run that is cut short may be overwritten too.
    (folder / REPORT).write_text("{}\n")
    yield folder
