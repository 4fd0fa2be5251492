"""What the answers of a server show of an adapter.

In: log-probabilities of the same tokens from the server, with and without the adapter, each twice; and from PEFT, at
any scaling of the adapter, if its folder is known. Out: an `Outcome`. All differences are of natural logarithms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_probe.ledger import Finding
from lora_probe.recording import Outcome
from lora_probe.recording.records import OutcomeKind
from lora_probe.rules.lp6_applying import (
    served_as_base,
    served_at_another_scaling,
    served_on_another_base,
    served_other_weights,
)

Doubles = npt.NDArray[np.float64]
Peft = Callable[[float], Doubles]
"""The log-probabilities in PEFT, by the adapter's scaling relative to the trained one; 0 is the base model."""

NOISE = 2.0
"""A difference below so many times that of two equal passes is none."""
USUAL = 0.95
"""The share of tokens whose noise counts."""
SHARE, ERRORS, ROUND_OFF = 0.02, 2.0, 1e-4
"""Two engines make the same change within this share of it, plus this many times the difference of both base models,
plus round-off."""
LEAST = 3.0
"""An effect that is smaller than so many times the difference of both base models cannot be judged."""
CLOSE = 0.1
"""A factor that differs from 1 by more is another scaling."""
OTHER_BASE = 0.5
"""Base models that differ by more are not the same model in another dtype: bfloat16 gives up to 0.05, and four bits
give up to 0.2."""
SCALINGS = (0.0, 2.0, 0.5, -1.0, 4.0, 0.25, 8.0, 0.125, 16.0, 0.0625)
"""The scalings that are tried first, relative to the trained one; then the best of them is refined."""
STEP, REFINEMENTS, ENOUGH = 0.02, 5, 1e-4
NO_EFFECT = 0.05
"""A factor below this is none."""


@dataclass(frozen=True)
class Passes:
    """`[tokens]` each: the server's log-probabilities in two passes for the base model and for the adapter."""

    base: tuple[Doubles, Doubles]
    adapter: tuple[Doubles, Doubles]

    @property
    def tokens(self) -> int:
        return len(self.base[0])

    @property
    def change(self) -> float:
        """The largest change that the adapter makes."""
        return _largest(self.adapter[0] - self.base[0])

    @property
    def noise(self) -> float:
        """The largest difference between two passes over the same tokens."""
        return max(_largest(first - second) for first, second in (self.base, self.adapter))

    @property
    def changes(self) -> bool:
        """Whether the change is more than noise, over all tokens: a single token may be noisy."""
        return rms(self.adapter[0] - self.base[0]) > NOISE * self.usual_noise

    @property
    def usual_noise(self) -> float:
        """The noise of most tokens: a few may be far off in a busy server."""
        return max(_usual(first - second) for first, second in (self.base, self.adapter))


def rms(values: Doubles) -> float:
    """The root mean square; 0 of nothing."""
    return float(np.sqrt(np.mean(np.square(values)))) if len(values) else 0.0


def _usual(values: Doubles) -> float:
    """The root mean square without the largest values."""
    return rms(np.sort(np.abs(values))[: int(np.ceil(USUAL * len(values)))])


def judged(
    load: int,
    adapter: str,
    base: str,
    passes: Passes,
    model: str = "",
    peft: Peft | None = None,
    scalable: bool = True,
) -> Outcome:
    """The outcome for an adapter that the server serves on `base`. With `peft`, its folder is known, and `model` is the
    base model there; `scalable`: its scaling is all that decides how much it changes."""
    if peft is None:
        return _by_itself(load, adapter, base, passes)
    return _against(load, adapter, base, passes, model, peft, scalable)


def _by_itself(load: int, adapter: str, base: str, passes: Passes) -> Outcome:
    """Whether the server's answers change at all."""
    if not passes.changes:
        return _as_base(load, adapter, base, passes)
    message = f"adapter `{adapter}` changes the server's answers ({_measured(passes)})"
    return Outcome(load, "changes", "", message, passes.tokens, passes.change, passes.noise)


def _as_base(load: int, adapter: str, base: str, passes: Passes, **more: float) -> Outcome:
    finding = served_as_base(adapter, base)
    message = f"{finding.message} ({_measured(passes)})"
    return Outcome(load, "as base", finding.code, message, passes.tokens, passes.change, passes.noise, **more)


def _against(load: int, adapter: str, base: str, passes: Passes, model: str, peft: Peft, scalable: bool) -> Outcome:
    """Whether the server runs the adapter of this folder. What is compared are changes of log-probabilities by the
    adapter, as the base models of both engines may differ a little."""
    plain, trained = peft(0.0), peft(1.0)
    base_error, effect = rms(passes.base[0] - plain), rms(trained - plain)
    noise = NOISE * passes.usual_noise + ROUND_OFF
    limit = ERRORS * base_error + noise + SHARE * effect

    def outcome(
        kind: OutcomeKind, finding: Finding | str, factor: float | None = None, error: float | None = None
    ) -> Outcome:
        code, message = ("", finding) if isinstance(finding, str) else (finding.code, finding.message)
        measures = passes.tokens, passes.change, passes.noise, factor, error, effect, base_error
        return Outcome(load, kind, code, message, *measures)

    if not (np.isfinite(plain).all() and np.isfinite(trained).all()):
        return outcome("undecided", "PEFT's log-probabilities contain NaN or infinity: check the adapter's folder")
    if base_error > OTHER_BASE:
        return outcome("other base", served_on_another_base(model, base_error))
    served = passes.adapter[0] - passes.base[0]
    if effect <= LEAST * base_error + noise:
        if rms(served) > LEAST * base_error + noise + effect:
            return outcome("other weights", served_other_weights(adapter, rms(served), effect))
        why = (
            f"PEFT and the server cannot be compared: the adapter changes PEFT's log-probabilities by {effect:.2g} on "
            f"these prompts, and the two base models differ by {base_error:.2g}; pass other prompts with --prompt"
        )
        return outcome("undecided", why)
    if not passes.changes:
        return _as_base(load, adapter, base, passes, factor=0.0, effect=effect, base_error=base_error)
    changes = {0.0: np.zeros_like(plain), 1.0: trained - plain}
    factor, error = fitted(served, changes, lambda scaling: peft(scaling) - plain, scalable)
    if error > limit:
        return outcome("other weights", served_other_weights(adapter, error, effect), None, error)
    if abs(factor) < NO_EFFECT:
        return outcome("as base", served_as_base(adapter, base), factor, error)
    if abs(factor - 1) > CLOSE:
        return outcome("other scaling", served_at_another_scaling(adapter, factor), factor, error)
    why = (
        f"the server runs `{adapter}` as trained: it changes log-probabilities by {effect:.2g} in PEFT, and in the "
        f"server by the same within {error:.2g} (the base models differ by {base_error:.2g})"
    )
    return outcome("as trained", why, factor, error)


def fitted(served: Doubles, known: Mapping[float, Doubles], peft: Peft, scalable: bool = True) -> tuple[float, float]:
    """The scaling at which PEFT comes closest to the server, and how close. `known` are scalings that were run; no
    others are tried of an adapter that is not `scalable`."""
    runs = dict(known)
    best = min(runs, key=lambda scaling: rms(served - runs[scaling]))
    if not scalable:
        return best, rms(served - runs[best])
    # One step from the trained scaling is enough if the server is near it, as it mostly is.
    for scaling in () if _near(served, known[1.0]) else SCALINGS:
        if scaling not in runs:
            runs[scaling] = peft(scaling)
    best = min(runs, key=lambda scaling: rms(served - runs[scaling]))
    error = rms(served - runs[best])
    for _ in range(REFINEMENTS):
        values = runs[best]
        step = STEP * (abs(best) or 1.0)
        slope = (peft(best + step) - values) / step
        square = float(slope @ slope)
        if square == 0:
            break
        nearer = best + float(slope @ (served - values)) / square
        if abs(nearer - best) < ENOUGH * (abs(best) or 1.0):
            break
        runs[nearer] = peft(nearer)
        if not rms(served - runs[nearer]) < error:
            break
        best, error = nearer, rms(served - runs[nearer])
    return best, error


def _near(served: Doubles, trained: Doubles) -> bool:
    """Whether most of the change is that of the trained scaling."""
    square = float(trained @ trained)
    return square > 0 and abs(float(served @ trained) / square - 1) < 2 * CLOSE


def _measured(passes: Passes) -> str:
    return (
        f"largest change of a log-probability {passes.change:.2f}, noise {passes.noise:.2f}, "
        f"over {passes.tokens} tokens"
    )


def _largest(values: Doubles) -> float:
    return float(np.abs(values).max()) if len(values) else 0.0
