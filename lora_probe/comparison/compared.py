"""The result of a comparison: `Comparison`, and each `Cause` of a difference.

In: what `contributions` and `causes` find in two traces of one adapter. Out: the verdict over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lora_probe.comparison.adapters import AdapterDifference
from lora_probe.comparison.answers import Outputs, Repeats
from lora_probe.comparison.joined import RequestDiff
from lora_probe.comparison.modules import ModuleDiff
from lora_probe.comparison.prompts import PromptDifference
from lora_probe.comparison.weights import WeightDifference
from lora_probe.ledger import Ledger
from lora_probe.names import Key, Universe, name_modules, path_of
from lora_probe.precision import agrees, logprob_drift
from lora_probe.prediction.predictor import title_of
from lora_probe.presented import Presented
from lora_probe.recording import Trace

Side = Literal["reference", "candidate", "both", ""]
SIDES: tuple[Side, Side] = ("reference", "candidate")


@dataclass(frozen=True)
class Cause:
    """One cause. `side` is the run in which something is wrong, empty if the traces do not show which. `factor` is that
    of the candidate's weights, if all modules have the same."""

    code: str
    name: str
    message: str
    hint: str
    modules: tuple[Key, ...] = ()
    factor: float | None = None
    evidence: tuple[str, ...] = ()
    side: Side = ""


@dataclass(frozen=True)
class Bisection:
    """The smallest set of modules that was found to change a token: of prompt `prompt`, the answer's token `token`,
    from the reference's id to `to`. `total` is how many modules differ between the runs, `runs` how many mixtures ran.
    If no module can be left out, it is `minimal`. `engine` ran them. `explained`: it chooses the candidate's token with
    all of its weights."""

    prompt: int
    token: int
    reference: int
    candidate: int
    to: int
    modules: tuple[str, ...]
    total: int
    runs: int
    minimal: bool
    engine: str

    @property
    def explained(self) -> bool:
        return self.to == self.candidate

    @property
    def text(self) -> str:
        """One or two sentences."""
        where = f"answer token {self.token + 1} of prompt {self.prompt + 1}"
        title = title_of(self.engine)
        if self.to == self.reference:
            return (
                f"no weights change {where}: {title} chooses token {self.reference} with those of either run, so"
                " the difference is not in the weights"
            )
        these = "this module changes" if len(self.modules) == 1 else f"these {len(self.modules)} modules change"
        less = "" if self.minimal else ", and perhaps fewer (the runs were used up)"
        other = "" if self.explained else f", where the candidate has {self.candidate}"
        return (
            f"{these} {where} from {self.reference} to {self.to}{other}: {name_modules(self.modules)}"
            f" ({len(self.modules)} of {self.total} that differ, found in {self.runs} runs in {title}{less})"
        )


Verdict = Literal["agree", "differ", "undecided"]


@dataclass(frozen=True)
class Divergence:
    """The first row and module, in the order of computation, that exceeds the tolerance."""

    prompt: int
    position: int
    token: int
    key: Key
    error: float


@dataclass(frozen=True, repr=False)
class Comparison(Presented):
    """The result of `compare`. Errors are relative to the reference.

    `adapters` and `file_weights` are what is known to differ between the files of the two adapters (`files`: their
    folders, None if they are the same; `unshared`: the modules that only one of them has,
    `other_tensors`: those that differ and are no A or B of a followed module), and `weights` between the
    weights that runs of one file multiply with. `prompts` are texts that became other tokens, `unasked` how many
    prompts each run answered without the adapter, and `repeats` how far each run agrees with itself. `estimated` is why
    some errors are estimates (those that are not `exact`), empty if none is. `causes` explain a difference, the most
    likely one first.
    """

    reference: Trace
    candidate: Trace
    ledgers: tuple[Ledger, Ledger]
    dtype: str
    tolerance: float
    rows: int
    modules: tuple[ModuleDiff, ...]
    requests: tuple[RequestDiff, ...]
    first: Divergence | None
    outputs: Outputs
    repeats: tuple[Mapping[str, Repeats], Mapping[str, Repeats]]
    notes: tuple[str, ...] = ()
    measured: bool = True
    prompts: tuple[PromptDifference, ...] = ()
    unasked: tuple[int, int] = (0, 0)
    adapters: tuple[AdapterDifference, ...] = ()
    files: tuple[str, str] | None = None
    file_weights: tuple[WeightDifference, ...] = ()
    unshared: tuple[tuple[Key, ...], tuple[Key, ...]] = ((), ())
    other_tensors: tuple[str, ...] = ()
    weights: tuple[WeightDifference, ...] = ()
    estimated: str = ""
    causes: tuple[Cause, ...] = ()
    bisection: Bisection | None = None

    @property
    def traces(self) -> tuple[Trace, Trace]:
        return self.reference, self.candidate

    @property
    def cause(self) -> Cause | None:
        """The most likely cause; None if the runs agree, or could not be compared."""
        return self.causes[0] if self.causes else None

    @property
    def worst(self) -> ModuleDiff | None:
        measured = [module for module in self.modules if module.error is not None]
        return max(measured, key=lambda module: module.error or 0.0, default=None)

    @property
    def largest_own(self) -> ModuleDiff | None:
        """The module that adds most to the difference by itself, if any adds more than rounding."""
        own = [diff for diff in self.modules if diff.parts is not None and diff.parts.own > agrees(self.dtype)]
        return max(own, key=lambda diff: diff.parts.own if diff.parts else 0.0, default=None)

    @property
    def differs(self) -> bool:
        """Whether rows or answers differ, or modules did not take effect, whatever the cause."""
        if any(ledger.refused or ledger.count("lost") or ledger.count("wrong") for ledger in self.ledgers):
            return True
        diverged = any(request.diverged for request in self.requests) and self.dtype == "float32"
        answers = self.outputs.adapter.differs(self.dtype)
        return diverged or answers or any(module.status != "ok" for module in self.modules)

    @property
    def verdict(self) -> Verdict:
        if self.causes:
            return "differ"
        judged = self.rows > 0 and all(ledger.healthy for ledger in self.ledgers)
        if any(trace.outcomes for trace in self.traces):
            # Nobody sees the layers of a server that was asked: the answers decide.
            error = self.outputs.adapter.logprob_error
            judged = error is not None and error <= logprob_drift(self.dtype)
        return "agree" if judged and self.reference.complete and self.candidate.complete else "undecided"

    def name(self, key: Key) -> str:
        """A module in short, as no other module of the comparison is named."""
        return name_modules([path_of(key)], Universe(tuple(path_of(diff.key) for diff in self.modules)))
