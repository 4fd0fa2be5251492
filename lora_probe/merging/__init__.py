"""A merged model against base plus adapter, in the weights: `check_merge`.

In: an adapter, its base, a merged model, all on disk. Out: a `MergeReport`. Base and merged model are streamed a block
of rows at a time, every tensor of both once, on as many threads as there are processors.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_probe.adapter import Adapter, open_adapter
from lora_probe.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from lora_probe.dequantised import dequantised
from lora_probe.errors import ProbeError, UnreadableFile
from lora_probe.ledger import Finding
from lora_probe.merging.diagnosis import Neighbours, judge, judge_replaced
from lora_probe.merging.report import MergeReport, ModuleMerge, TensorFinding
from lora_probe.merging.scan import measure, replaced
from lora_probe.merging.sites import HEAD, Plan, Site, embeddings_of, plan
from lora_probe.merging.untouched import absent_and_added, chunks, untouched
from lora_probe.rounding import UNIT
from lora_probe.rules.merging import another_base, not_judged, tied_changed_too, tied_places_differ

ANOTHER_BASE = 0.5
"""The share of untouched tensors that must differ to speak of another base."""


@dataclass(frozen=True)
class Progress:
    """Bytes of both checkpoints so far, of all, and the tensor at hand."""

    done: int
    total: int
    tensor: str


def check_merge(
    adapter: str | Path,
    merged: str | Path,
    *,
    model: str | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> MergeReport:
    """Check whether `merged` is the base plus `adapter`, as PEFT merges.

    Raises:
        UnreadableFile: a folder that is missing, damaged, cut short, or of another architecture.
        ProbeError: no base is named; the base or the merged model is quantised in a way that cannot be undone here.
    """
    started = time.perf_counter()
    checkpoint = open_adapter(adapter)
    name = model or checkpoint.config.base_model
    if name is None:
        raise ProbeError(f"`{checkpoint.config.path}` names no base model", "give its folder or id with --model")
    base, target = (dequantised(one) for one in (open_checkpoint(name), open_checkpoint(merged)))
    names = _aligned(base, target)
    base, torn = _with_head(base, target, names)
    work = _Work(checkpoint, base, target, names, plan(checkpoint, base), progress)
    modules, tensors, compared = work.run()
    tensors = [*torn, *_unplaced(work.plan), *tensors]
    modules, tensors = _of_another_base(modules, tensors, compared)
    return MergeReport(
        adapter=checkpoint.path,
        base=base.path,
        merged=target.path,
        base_dtype=_dtype(base),
        merged_dtype=_dtype(target),
        modules=tuple(modules),
        tensors=tuple(tensors),
        compared=compared + len({module.tensor for module in modules}),
        read=work.done,
        seconds=time.perf_counter() - started,
        notes=checkpoint.notes,
    )


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the values."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype])


def _aligned(base: Checkpoint, merged: Checkpoint) -> dict[str, str]:
    """Base name -> name in the merged model; one prefix more or less on all names is the same architecture.

    Raises:
        UnreadableFile: hardly a matrix of the base has a namesake of its shape.
    """
    best: dict[str, str] = {}
    fits = -1
    for prefix in _prefixes(base, merged):
        names = {name: f"{prefix[0]}{name.removeprefix(prefix[1])}" for name in base.tensors}
        found = sum(
            other in merged.tensors and merged.tensors[other].shape == base.tensors[name].shape
            for name, other in names.items()
        )
        if found > fits:
            best, fits = names, found
    if fits * 2 < len(base.tensors):
        raise UnreadableFile(
            f"`{merged.path}` is of another architecture than `{base.path}`: {fits} of {len(base.tensors)} "
            "tensors have a namesake of the same shape in it",
            "name the base that was merged into with --model",
        )
    return best


def _prefixes(base: Checkpoint, merged: Checkpoint) -> list[tuple[str, str]]:
    """(prefix to add, prefix to remove) that may turn the base's names into the merged model's."""
    found = [("", "")]
    for one, other, adds in ((base, merged, False), (merged, base, True)):
        longest = max(one.tensors, key=len)
        head = ""
        for part in longest.split(".")[:3]:
            head += f"{part}."
            if longest.removeprefix(head) in other.tensors:
                found.append((head, "") if adds else ("", head))
    return found


def _with_head(base: Checkpoint, merged: Checkpoint, names: dict[str, str]) -> tuple[Checkpoint, list[TensorFinding]]:
    """The base with its tied output head as a tensor of its own where the merged model holds one that differs, and
    without a copy of it where the merged model holds one matrix for both."""
    embeddings = embeddings_of(base)
    if not base.tied or embeddings is None:
        return base, []
    if HEAD not in merged.tensors:
        return replace(base, tensors={name: t for name, t in base.tensors.items() if name != HEAD}), []
    one, two = merged.tensors.get(names[embeddings]), merged.tensors[HEAD]
    if one is None or _equal(one, two):
        # One matrix, written twice.
        names.setdefault(HEAD, HEAD)
        return base, []
    names[HEAD] = HEAD
    torn = [TensorFinding(HEAD, tied_places_differ(HEAD, embeddings))] if merged.tied else []
    return replace(base, tensors={HEAD: replace(base.tensors[embeddings], name=HEAD), **base.tensors}), torn


def _equal(one: StoredTensor, two: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    return all(np.array_equal(one.rows(*span), two.rows(*span)) for span in chunks(one))


def _unplaced(found: Plan) -> list[TensorFinding]:
    labels = [
        (one, ".".join(filter(None, one.key[:2])) if one.key[1] != "weight" else one.key[0]) for one in found.unplaced
    ]
    return [TensorFinding(label, not_judged(one.why)) for one, label in labels]


def _of_another_base(
    modules: list[ModuleMerge], tensors: list[TensorFinding], compared: int
) -> tuple[list[ModuleMerge], list[TensorFinding]]:
    """Where most untouched tensors differ, one finding for them, and one for the modules whose change that hides."""
    differing = [one for one in tensors if one.finding.code == "LP708"]
    if compared == 0 or len(differing) <= ANOTHER_BASE * compared or len(differing) < 2:
        return modules, tensors
    finding = another_base(len(differing), compared)
    rest = [one for one in tensors if one.finding.code != "LP708"]
    hidden = [
        replace(module, findings=()) if {f.code for f in module.findings} <= {"LP706"} else module for module in modules
    ]
    return hidden, [TensorFinding("", finding), *rest]


class _Work:
    """One run over both checkpoints: the tensors still to do, and how far it is."""

    def __init__(
        self,
        adapter: Adapter,
        base: Checkpoint,
        merged: Checkpoint,
        names: dict[str, str],
        found: Plan,
        progress: Callable[[Progress], None],
    ) -> None:
        self.adapter, self.base, self.merged, self.names, self.plan = adapter, base, merged, names, found
        self.progress, self.done = progress, 0
        self.total = base.size + merged.size
        self.factors: list[float] = []
        self.sites = found.by_tensor()

    def run(self) -> tuple[list[ModuleMerge], list[TensorFinding], int]:
        """Modules in the order of the plan, findings on other tensors, and how many of those were compared."""
        tensors = list(absent_and_added(self.base, self.merged, self.names))
        bad = {one.name for one in tensors}
        jobs = [(name, tensor) for name, tensor in self.base.tensors.items() if self.names[name] in self.merged.tensors]
        jobs = [(name, tensor) for name, tensor in jobs if name not in bad]
        modules: dict[str, ModuleMerge] = {}
        rest = 0
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for name, judged, finding in pool.map(lambda job: self._tensor(*job), jobs):
                modules |= {module.label: module for module in judged}
                rest += not judged
                if finding is not None:
                    tensors.append(TensorFinding(name, finding))
        return [modules[site.label] for site in self.plan.sites if site.label in modules], tensors, rest

    def _tensor(self, name: str, tensor: StoredTensor) -> tuple[str, list[ModuleMerge], Finding | None]:
        merged = self.merged.tensors[self.names[name]]
        sites = self.sites.get(name, [])
        finding = None
        judged: list[ModuleMerge] = []
        if sites and merged.dtype in UNIT and tensor.dtype in UNIT:
            judged = [self._site(site, merged) for site in sites]
            judged = self._tied(judged, sites, name)
        elif sites:
            finding = not_judged(f"it is {tensor.dtype} in the base and {merged.dtype} in the merged model")
        else:
            finding = untouched(tensor, merged, self.plan.overwritten.get(name), self.adapter)
        self.done += tensor.size + merged.size
        self.progress(Progress(self.done, self.total, name))
        return name, judged, finding

    def _site(self, site: Site, merged: StoredTensor) -> ModuleMerge:
        if site.kind in ("whole", "tokens"):
            return judge_replaced(site, replaced(site, self.base, merged, self.adapter), merged.dtype)
        found = measure(site, self.base, merged, self.adapter)
        alike = [other for other in self.plan.sites if other.kind == site.kind and other.cut == site.cut]
        module = judge(found, Neighbours(alike, self.base, self.adapter), tuple(self.factors))
        factor = (module.implied_scaling or 0.0) / site.scaling if site.scaling else 0.0
        if module.status == "differs" and math.isfinite(factor) and factor not in (0.0, 1.0, *self.factors):
            self.factors.append(factor)
        return module

    def _tied(self, judged: list[ModuleMerge], sites: list[Site], name: str) -> list[ModuleMerge]:
        """One matrix for input and output embeddings, of which the adapter changes one place."""
        if not (self.base.tied and self.merged.tied) or name not in self._embeddings():
            return judged
        adapted = {site.key[0] for site in sites if site.kind != "tokens"}
        if len(adapted) != 1:
            return judged
        warning = tied_changed_too(adapted.pop())
        return [replace(module, findings=(*module.findings, warning)) for module in judged]

    def _embeddings(self) -> set[str]:
        return {name for name in (embeddings_of(self.base), HEAD) if name is not None}
