"""Traces of several adapters: each adapter compared with its counterpart in the other trace.

In: a reference and a candidate trace, perhaps the name of an adapter. Out: a `Comparison` for each adapter that both
traces have, and what has no counterpart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_probe.comparison.compared import Comparison, Verdict
from lora_probe.comparison.contributions import compare_traces
from lora_probe.comparison.sides import Settings, opened
from lora_probe.errors import ProbeError, words_of
from lora_probe.names import in_words
from lora_probe.presented import Presented
from lora_probe.recording import Load, Trace
from lora_probe.recording.one_adapter import of_adapter


@dataclass(frozen=True, repr=False)
class Comparisons(Presented):
    """The comparisons by the name of the adapter. `notes` are about adapters without a counterpart."""

    reference: Trace
    candidate: Trace
    by_adapter: Mapping[str, Comparison]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """The worst one. Adapters without a counterpart leave it undecided at best."""
        verdicts = {comparison.verdict for comparison in self.by_adapter.values()}
        if "differ" in verdicts:
            return "differ"
        return "undecided" if "undecided" in verdicts or self.notes else "agree"


def compare_each(
    reference: Trace | str | Path,
    candidate: Trace | str | Path,
    rtol: float | None = None,
    adapter: str | None = None,
    *,
    atol: float = 0.0,
) -> Comparisons:
    """Compare every adapter of the reference, with all of its loads, with the adapter of the same name in the
    candidate, or else with one of the same content. Two traces with a single adapter each are compared whatever its
    names are. With `adapter`, only the one of that name; a trace with a single adapter is taken to have it. `rtol` and
    `atol`: as in `compare_traces`.

    Raises:
        ProbeError: a trace has no load of an adapter, no adapter is in both, or a tolerance is no number of at least 0.
    """
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is not None and not tolerance >= 0:
            raise ProbeError(f"`{name}` must be a number of at least 0, not {tolerance}")
    reference, candidate = opened(reference, candidate, Settings())
    loads = [_newest(trace) for trace in (reference, candidate)]
    for trace, of_trace, of_other in zip((reference, candidate), loads, reversed(loads), strict=True):
        if not of_trace and not (of_other and trace.answers):
            raise ProbeError(
                f"`{trace.path}` contains no load of an adapter", "trace an adapter first; see `lora-probe show`"
            )
    for trace, of_trace in zip((reference, candidate), loads, strict=True):
        if adapter is not None and len(of_trace) > 1 and adapter not in of_trace:
            raise ProbeError(f"`{trace.path}` has no adapter `{adapter}`", f"pass one of: {', '.join(of_trace)}")
    if adapter is not None and all(adapter not in of_trace for of_trace in loads):
        known = ", ".join(dict.fromkeys((*loads[0], *loads[1])))
        raise ProbeError(f"neither trace has an adapter `{adapter}`", f"pass one of: {known}")
    if all(len(of_trace) < 2 for of_trace in loads):
        (name,) = loads[0] or loads[1]
        return Comparisons(reference, candidate, {name: compare_traces(reference, candidate, rtol, atol)})
    if not all(loads):
        return _against_the_base(reference, candidate, adapter, rtol, atol)
    pairs = list(_pairs(loads[0], loads[1], adapter))
    if not pairs:
        names = [in_words(list(of_trace)) for of_trace in loads]
        raise ProbeError(
            f"`{reference.path}` and `{candidate.path}` have no adapter in common: {names[0]}; {names[1]}",
            "choose the one that both should have with --adapter",
        )
    compared = {
        one.name: compare_traces(of_adapter(reference, one.name), of_adapter(candidate, two.name), rtol, atol)
        for one, two in pairs
    }
    unmatched = () if adapter is not None else tuple(_unmatched(reference, candidate, loads, pairs))
    return Comparisons(reference, candidate, compared, unmatched)


def compare(
    reference: Trace | str | Path,
    candidate: Trace | str | Path,
    rtol: float | None = None,
    adapter: str | None = None,
    *,
    atol: float = 0.0,
    checkpoint: str | Path | None = None,
    model: str | None = None,
    prompts: str | Sequence[str] = (),
    chat: bool = False,
    max_tokens: int = 32,
    options: dict[str, Any] | None = None,
    engine_args: Sequence[str] = (),
) -> Comparison:
    """Compare two runs of an adapter: traces, their paths, or the names of engines, which are recorded first with
    `checkpoint` and what follows it, as in `trace`. `adapter` is the name of the one to compare if a trace has several:
    `compare_each` compares all of them.

    Raises:
        ProbeError: a trace has no load of an adapter, the traces have no adapter or no prompt in common, or they have
            several adapters and none is chosen; or as `trace` does.
        UnreadableFile: a trace records an unknown dtype, or is damaged.
    """
    ckpt = None if checkpoint is None else str(checkpoint)
    run = Settings(ckpt, model, words_of("prompts", prompts), chat, max_tokens, options or {}, engine_args)
    comparisons = compare_each(*opened(reference, candidate, run), rtol, adapter, atol=atol)
    if len(comparisons.by_adapter) > 1:
        names = ", ".join(comparisons.by_adapter)
        raise ProbeError(f"the traces have several adapters: {names}", "pass one of them as `adapter`")
    (comparison,) = comparisons.by_adapter.values()
    return comparison


def _against_the_base(
    reference: Trace, candidate: Trace, adapter: str | None, rtol: float | None, atol: float
) -> Comparisons:
    """One of the runs answered without any adapter: each adapter of the other one against it."""
    compared: dict[str, Comparison] = {}
    for name in _newest(reference) or _newest(candidate):
        if adapter in (None, name):
            one, two = (of_adapter(trace, name) if trace.loads else trace for trace in (reference, candidate))
            compared[name] = compare_traces(one, two, rtol, atol)
    return Comparisons(reference, candidate, compared)


def _newest(trace: Trace) -> dict[str, Load]:
    """The newest load of every adapter, by its name."""
    return {load.name: load for load, _ in trace.loads}


def _pairs(
    reference: Mapping[str, Load], candidate: Mapping[str, Load], adapter: str | None
) -> Iterator[tuple[Load, Load]]:
    """The loads that belong together. Each trace has the chosen adapter, or a single one."""
    if adapter is not None:
        one, two = (of_trace.get(adapter) or next(iter(of_trace.values())) for of_trace in (reference, candidate))
        yield one, two
        return
    free = [load for name, load in candidate.items() if name not in reference]
    for name, one in reference.items():
        if name in candidate:
            yield one, candidate[name]
        elif (other := next((load for load in free if load.digest and load.digest == one.digest), None)) is not None:
            free.remove(other)
            yield one, other


def _unmatched(
    reference: Trace, candidate: Trace, loads: list[dict[str, Load]], pairs: list[tuple[Load, Load]]
) -> Iterator[str]:
    for number, trace in enumerate((reference, candidate)):
        taken = {pair[number].name for pair in pairs}
        for name in loads[number]:
            if name not in taken:
                yield f"adapter `{name}` is only in {trace.path}"
