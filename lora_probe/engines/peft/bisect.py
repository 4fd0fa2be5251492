"""Which modules of an adapter change one token: PEFT with the weights of two runs, module by module.

In: a working folder with the request in `bisect.json`. Out: in that folder, the result in `bisected.json` and the
timeline in `bisect/events.jsonl`. It runs in a separate process, which `launch.bisect` starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from lora_probe.engines.peft.models import first_lines, load_model
from lora_probe.errors import EngineFailed
from lora_probe.recording import SCHEMA, Process, TraceWriter, write_json

BISECT, BISECTED = "bisect.json", "bisected.json"
REFERENCE, CANDIDATE = "reference", "candidate"


class BisectSpec(msgspec.Struct, frozen=True):
    """What to run: the base `model` in `dtype` after `ids`, with two adapters (folders, perhaps the same). `changed`
    are the modules that differ; of these `off` run without an adapter in the candidate, and `factors` at another scale.
    At most `runs` mixtures are tried."""

    model: str
    dtype: str
    reference: str
    candidate: str
    ids: list[int]
    changed: list[str]
    off: list[str]
    factors: dict[str, float]
    runs: int


class Bisected(msgspec.Struct, frozen=True):
    """The most likely next token with all modules of the reference, and with all of the candidate; and the smallest set
    of modules that was found to change one into the other, which is one from which no module can be taken away if it is
    `minimal`."""

    reference: int
    candidate: int
    modules: list[str]
    runs: int
    minimal: bool


def bisect_in(folder: Path) -> None:
    """Run the request of a folder.

    Raises:
        EngineFailed: with the message of transformers or PEFT.
    """
    spec = msgspec.json.decode((folder / BISECT).read_bytes(), type=BisectSpec)
    process = Process(SCHEMA, role="bisect", engine="peft", rank=0, pid=os.getpid(), versions={})
    with TraceWriter(folder / "bisect", process) as writer:
        mixture = _Mixture(spec)
        before, after = mixture.next_token(()), mixture.next_token(spec.changed)

        def report(size: int, runs: int) -> None:
            writer.event("bisect", f"{runs} of at most {spec.runs} runs, {size} of {len(spec.changed)} modules left")

        modules, minimal, runs = list[str](), False, 2
        if before != after:
            changes = Limited(lambda chosen: mixture.next_token(chosen) == after, spec.runs - runs)
            modules, minimal = smallest(spec.changed, changes, report)
            runs += changes.runs
        write_json(folder / BISECTED, Bisected(before, after, modules, runs, minimal))


class Limited:
    """A test of sets of modules that remembers its results, and gives up after `most` runs."""

    def __init__(self, test: Callable[[Sequence[str]], bool], most: int) -> None:
        self._test, self._most = test, most
        self._known: dict[frozenset[str], bool] = {}

    @property
    def runs(self) -> int:
        return len(self._known)

    @property
    def spent(self) -> bool:
        return self.runs >= self._most

    def __call__(self, chosen: Sequence[str]) -> bool:
        key = frozenset(chosen)
        if key not in self._known:
            if self.spent:
                return False
            self._known[key] = self._test(chosen)
        return self._known[key]


def smallest(
    every: Sequence[str], changes: Limited, report: Callable[[int, int], None] = lambda *_: None
) -> tuple[list[str], bool]:
    """The smallest part of `every` for which `changes` is true, and whether no element can be left out of it.

    Zeller and Hildebrandt, Simplifying and isolating failure-inducing input (2002): parts are tried first, then what
    is left without each part, with smaller parts when neither shows it.
    """
    current, count = list(every), 2
    while len(current) > 1 and not changes.spent:
        report(len(current), changes.runs)
        parts = _divided(current, count)
        rests = [[module for module in current if module not in part] for part in map(set, parts)]
        if (part := next((part for part in parts if changes(part)), None)) is not None:
            current, count = part, 2
        elif count > 2 and (rest := next((rest for rest in rests if changes(rest)), None)) is not None:
            current, count = rest, max(count - 1, 2)
        elif count >= len(current):
            return current, not changes.spent
        else:
            count = min(2 * count, len(current))
    return current, len(current) == 1


def _divided(modules: Sequence[str], count: int) -> list[list[str]]:
    bounds = [len(modules) * number // count for number in range(count + 1)]
    return [list(modules[begin:end]) for begin, end in pairwise(bounds)]


class _Mixture:
    """A model whose modules run with the weights of either run."""

    def __init__(self, spec: BisectSpec) -> None:
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        self._spec = spec
        model = load_model(spec.model, spec.dtype)
        try:
            self._model = PeftModel.from_pretrained(model, spec.reference, adapter_name=REFERENCE)
            self._model.load_adapter(spec.candidate, adapter_name=CANDIDATE)
        # PEFT may raise any exception; its message is passed on.
        except Exception as error:
            raise EngineFailed(f"PEFT cannot load both adapters: {first_lines(error)}") from error
        self._model.eval()
        base = self._model.get_base_model()
        self._layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, LoraLayer)}
        for module, factor in spec.factors.items():
            if (layer := self._layers.get(module)) is not None:
                layer.scaling[CANDIDATE] *= factor

    def next_token(self, changed: Collection[str]) -> int:
        """The most likely next token if these modules run as in the candidate."""
        import torch

        for name, layer in self._layers.items():
            active = CANDIDATE if name in changed else REFERENCE
            has = active in layer.lora_A or active in layer.lora_embedding_A
            layer.set_adapter([active] if has and not (name in changed and name in self._spec.off) else [])
        ids = torch.tensor([self._spec.ids], device=next(self._model.parameters()).device)
        with torch.inference_mode():
            logits: Any = self._model(input_ids=ids).logits
        return int(logits[0, -1].argmax())
