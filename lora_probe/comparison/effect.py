"""The outputs of a merged model compared with the unmerged adapter: how much of the adapter's effect survives.

In: the scored trace of an adapter, and the plain trace of a merged model on the same tokens. Out: an `Effect`:
distances between next-token distributions over the whole vocabulary, and the first token and the first module that
differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_probe.comparison.outputs import FirstModule, ModuleOutput, compare_outputs
from lora_probe.comparison.tolerance import NOT_RECORDED_NOTE, judged_dtype
from lora_probe.errors import ProbeError
from lora_probe.names import Key, name_modules, path_of
from lora_probe.precision import NOT_RECORDED, drift, finite, floor
from lora_probe.recording import Floats, Score, Scored, Trace

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """Distances over some answer tokens. Each is a distribution over the vocabulary: unmerged p, merged q, base b.

    `kl_merged` is the mean of KL(p‖q) = Σ p·(log p − log q) in nats, infinite if a distribution contains NaN; `kl_base`
    the mean of KL(p‖b). `survives` = 1 − sqrt(kl_merged / kl_base) is the share of the adapter's effect that the merge
    kept: KL is quadratic in a small change, so its root is a distance. It is below 0 if the merged model is further
    away than the base, and None if there is no effect to keep (`floor`) or the base was not measured. `top1` is the
    share of tokens whose most likely successor is the same in merged and unmerged, `base_top1` in base and unmerged.
    `logprob_error` is the largest |log q − log p| of the answer tokens themselves. All are None if nothing was
    measured.
    """

    tokens: int
    kl_merged: float | None
    kl_base: float | None
    survives: float | None
    top1: float | None
    base_top1: float | None
    logprob_error: float | None


@dataclass(frozen=True)
class FirstToken:
    """The first token that the merged model would choose differently: its index in the answer, and both ids (`merged`
    is None if its distribution is not finite)."""

    token: int
    unmerged: int
    merged: int | None


@dataclass(frozen=True)
class PromptEffect(Measures):
    """One prompt. `prompt` is its index in the unmerged run."""

    prompt: int
    first_token: FirstToken | None


@dataclass(frozen=True)
class Effect(Measures):
    """All prompts together. `tolerance` is what `precision.drift` allows a module at `dtype`, the coarsest dtype of the
    two runs; a single row may be ROW_SLACK times further away. `modules` are in the order of computation. `notes`
    report what could not be measured."""

    unmerged: Trace
    merged: Trace
    dtype: str
    tolerance: float
    prompts: tuple[PromptEffect, ...]
    first_module: FirstModule | None
    modules: tuple[ModuleOutput, ...]
    notes: tuple[str, ...]

    @property
    def worst_module(self) -> ModuleOutput | None:
        """The module whose outputs differ most."""
        return max(self.modules, key=lambda module: module.error, default=None)

    def name(self, key: Key) -> str:
        """A module in short, as no other module of the adapter is named."""
        return name_modules([path_of(key)], next((ledger.names for _, ledger in self.unmerged.loads), None))


def effect(unmerged: Trace, merged: Trace) -> Effect:
    """How much of the adapter's effect is left in the merged model.

    Raises:
        ProbeError: a trace has no scores, or the traces have no prompt in common, different answer tokens for the same
            prompt, or vocabularies of different sizes.
        UnreadableFile: a trace is damaged, or records an unknown dtype.
    """
    pairs, notes = _pairs(unmerged, merged)
    bases = {_tokens(scored.score): scored for scored in unmerged.scores if scored.score.kind == "base"}
    dtype = judged_dtype((w, w.process.dtype) for trace in (unmerged, merged) for w in trace.workers)
    if dtype == NOT_RECORDED:
        notes.append(NOT_RECORDED_NOTE)
    prompts, tables = [], []
    for scored, of_merged in pairs:
        table = _table(scored, of_merged, bases.get(_tokens(scored.score)), notes)
        if table is not None:
            tables.append(table)
            prompts.append(
                PromptEffect(**_measures([table], dtype), prompt=scored.score.prompt, first_token=table.first)
            )
    for trace in (unmerged, merged):
        if not trace.complete:
            notes.append(f"{trace.path} is incomplete: {', '.join(trace.unclosed)}")
    scores = [(scored.score, of_merged.score) for scored, of_merged in pairs]
    first, modules = compare_outputs(unmerged, merged, scores, drift(dtype), notes)
    return Effect(
        **_measures(tables, dtype),
        unmerged=unmerged,
        merged=merged,
        dtype=dtype,
        tolerance=drift(dtype),
        prompts=tuple(prompts),
        first_module=first,
        modules=modules,
        notes=tuple(dict.fromkeys(notes)),
    )


def _tokens(score: Score) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(score.prompt_ids), tuple(score.answer_ids)


def _pairs(unmerged: Trace, merged: Trace) -> tuple[list[tuple[Scored, Scored]], list[str]]:
    """The passes of both runs over the same tokens, and notes."""
    of_unmerged = [scored for scored in unmerged.scores if scored.score.kind == "adapter"]
    of_merged = {tuple(scored.score.prompt_ids): scored for scored in merged.scores if scored.score.kind == "plain"}
    if not of_unmerged:
        refused = next((load.message for load, _ in unmerged.loads if load.refused), None)
        why = f": {unmerged.engine} refused it ({refused})" if refused is not None else ""
        raise ProbeError(f"`{unmerged.path}` contains no scored answer of an adapter{why}")
    if not of_merged:
        raise ProbeError(f"`{merged.path}` contains no scored answer of a model without an adapter")
    pairs, notes = [], []
    for scored in of_unmerged:
        other = of_merged.get(tuple(scored.score.prompt_ids))
        if other is None:
            notes.append(f"prompt {scored.score.prompt + 1} was not run through the merged model")
        elif other.score.answer_ids != scored.score.answer_ids:
            raise ProbeError(
                f"the two runs saw different tokens after prompt {scored.score.prompt + 1}: "
                f"`{unmerged.path}` and `{merged.path}` cannot be compared",
                "record the merged model on the answers of the unmerged run",
            )
        else:
            pairs.append((scored, other))
    if not pairs:
        raise ProbeError(f"`{unmerged.path}` and `{merged.path}` have no prompt in common")
    return pairs, notes


@dataclass(frozen=True)
class _Table:
    """The measurements of every answer token of some prompts, `[tokens]`; the base's columns may be missing."""

    kl_merged: Doubles
    kl_base: Doubles | None
    same: npt.NDArray[np.bool_]
    base_same: npt.NDArray[np.bool_] | None
    errors: Doubles
    first: FirstToken | None


def _table(one: Scored, two: Scored, base: Scored | None, notes: list[str]) -> _Table | None:
    """All tokens of one prompt; None if a run kept no distributions."""
    for scored in (one, two, base):
        if scored is not None and scored.score.unmeasured:
            what = f"the next-token distributions of {_WHOSE[scored.score.kind]}"
            notes.append(f"{what} were not measured: {scored.score.unmeasured}")
    p, q = one.logprobs(), two.logprobs()
    if p is None or q is None:
        return None
    b = base.logprobs() if base is not None else None
    answer = one.score.answer_ids
    for scored, values in ((one, p), (two, q), (base, b)):
        if scored is None or values is None:
            continue
        if values.shape[1] != p.shape[1]:
            raise ProbeError(
                f"the vocabularies differ: {p.shape[1]} tokens in `{one.path}`, {values.shape[1]} in `{scored.path}`",
                "was the merged model made from the same base?",
            )
        if np.isnan(values).any():
            notes.append(f"a next-token distribution of {_WHOSE[scored.score.kind]} contains NaN")
    best = [np.where(np.isnan(values).any(-1), -1, values.argmax(-1)) for values in (p, q)]
    different = np.flatnonzero(best[1] != best[0])
    first = None
    if len(different):
        at = int(different[0])
        chosen = int(best[1][at])
        first = FirstToken(at, int(best[0][at]), chosen if chosen >= 0 else None)
    base_best = b.argmax(-1) if b is not None else None
    rows = np.arange(len(answer))
    errors = np.abs(q[rows, answer].astype(np.float64) - p[rows, answer])
    return _Table(
        kl_merged=divergence(p, q),
        kl_base=divergence(p, b) if b is not None else None,
        same=best[0] == best[1],
        base_same=best[0] == base_best if base_best is not None else None,
        errors=np.where(np.isnan(errors), np.inf, errors),
        first=first,
    )


_WHOSE = {"adapter": "the unmerged adapter", "base": "the base", "plain": "the merged model"}


def divergence(p: Floats, q: Floats) -> Doubles:
    """KL(p‖q) = Σ p·(log p − log q) in nats for each row of two tables of log-probabilities, `[rows, vocabulary]`.

    Both are normalised again in float64: the round-off of a float32 normalisation enters KL in first order, the
    measured change only in second. Infinite if a row contains NaN.
    """
    result = np.empty(len(p))
    # Row by row: a float64 copy of a whole table would be as large as everything else together.
    for row, pair in enumerate(zip(p, q, strict=True)):
        log_p, log_q = (_normalised(values.astype(np.float64)) for values in pair)
        possible = log_p != -np.inf
        total = float(np.sum(np.exp(log_p[possible]) * (log_p[possible] - log_q[possible])))
        result[row] = np.inf if np.isnan(total) else max(total, 0.0)
    return result


def _normalised(values: Doubles) -> Doubles:
    most = values.max()
    result: Doubles = values - (most + np.log(np.exp(values - most).sum()))
    return result


def _measures(tables: Sequence[_Table], dtype: str) -> dict[str, Any]:
    """The fields of `Measures` over all tokens of `tables`."""
    tokens = sum(len(table.same) for table in tables)
    if not tokens:
        return dict.fromkeys(Measures.__dataclass_fields__) | {"tokens": 0}
    kl_merged = float(np.concatenate([table.kl_merged for table in tables]).mean())
    kl_bases = [table.kl_base for table in tables if table.kl_base is not None]
    base_same = [table.base_same for table in tables if table.base_same is not None]
    # A mean over other tokens than those of kl_merged cannot be compared with it.
    kl_base = float(np.concatenate(kl_bases).mean()) if len(kl_bases) == len(tables) else None
    kept = kl_base is not None and np.isfinite(kl_base) and kl_base >= floor(dtype)
    return {
        "tokens": tokens,
        "kl_merged": kl_merged,
        "kl_base": kl_base,
        "survives": 1 - float(np.sqrt(kl_merged / kl_base)) if kept and kl_base is not None else None,
        "top1": float(np.concatenate([table.same for table in tables]).mean()),
        "base_top1": float(np.concatenate(base_same).mean()) if len(base_same) == len(tables) else None,
        "logprob_error": float(max(table.errors.max() for table in tables)),
    }


def as_json(effect: Effect) -> dict[str, Any]:
    """Plain values for JSON; values that are not finite become None."""
    first, worst = effect.first_module, effect.worst_module
    return {
        **_plain(effect),
        "dtype": effect.dtype,
        "tolerance": effect.tolerance,
        "first_module": None
        if first is None
        else {**_key(first.key), "prompt": first.prompt, "position": first.position, "token": first.token}
        | {"error": finite(first.error)},
        "worst_module": None if worst is None else _module(worst),
        "modules": [_module(module) for module in effect.modules],
        "prompts": [_of_prompt(prompt) for prompt in effect.prompts],
        "notes": list(effect.notes),
    }


def _of_prompt(effect: PromptEffect) -> dict[str, Any]:
    first = effect.first_token
    token = None if first is None else {"token": first.token, "unmerged": first.unmerged, "merged": first.merged}
    return {"prompt": effect.prompt, **_plain(effect), "first_token": token}


def _plain(measures: Measures) -> dict[str, Any]:
    return {name: finite(getattr(measures, name)) for name in Measures.__dataclass_fields__}


def _module(module: ModuleOutput) -> dict[str, Any]:
    return {**_key(module.key), "error": finite(module.error)}


def _key(key: Key) -> dict[str, Any]:
    return {"module": key[0], "parameter": key[1], "expert": key[2]}
